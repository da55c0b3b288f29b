"""The package imports and answers where Linux's modules, files and functions are missing, as far as that can be played.

Windows and macOS themselves were not at hand: `tests/support/elsewhere.py` takes away what they lack.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file for folder in ("hybrimoe_kt", "kernels", "optimize_rules") for file in (ROOT / folder).rglob("*.py")
)

OPTIONS = ("-X", "warn_default_encoding", "-W", "ignore::EncodingWarning")
LEFT_OUT = ("hybrimoe_kt.__main__", "hybrimoe_kt.host.kt", "hybrimoe_kt.host.vllm", "hybrimoe_kt.host.sglang")
"""What runs when imported, and what lives inside the legacy framework and inside engines."""
RUN = """
import importlib, sys
from hybrimoe_kt.cli.main import main
from hybrimoe_kt.server.run import bind

same = ["--prompt", "Hi", "--temperature", "0", "--max_new_tokens", "8", "--cpu_backend", "torch_reference"]
print("before:", main([*same, "--gguf_path", sys.argv[2]]))  # loads what there is of foreign libraries

from tests.support.elsewhere import become
become(sys.argv[1])

refused = {}
for name in sys.argv[3].split():
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        refused[name] = error.name.partition(".")[0]
print("refused:", sorted(set(refused.values())), sorted({name.split(".")[1] for name in refused}))

from hybrimoe_kt.device.emulated.immediate import host_available_bytes
from hybrimoe_kt.device.inspect_machine import inspect_cpu, inspect_memory
memory = inspect_memory()
print("memory:", 0 < host_available_bytes() <= memory["total_bytes"], 0 < memory["available_bytes"])
print("cpu:", inspect_cpu()["features_from"], inspect_cpu()["logical_cores"] > 0)

from hybrimoe_kt.cli.main import main
from hybrimoe_kt.device.waiting import Deadline
polls = iter((False, False, True))
Deadline(60).wait(lambda: next(polls), "polling")

print("plain:", main([*same, "--gguf_path", sys.argv[2]]))
print("cached:", main([*same, "--accelerator", "emulated", "--cache_size", "25%", "--host_store", "page_locked"]))

from hybrimoe_kt.server.run import bind
from hybrimoe_kt.server.settings import Settings
with bind(Settings(port=0)) as listener:
    listener.listen()
    print("bound:", listener.getsockname()[0])
"""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "hybrimoe_kt" else ("hybrimoe_kt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_module_imports_and_the_embedded_model_answers(platform: str, tiny_model: Path) -> None:
    """With a console of Windows' Western code page, too."""
    modules = [name for name in map(module_of, SOURCES) if not name.startswith(LEFT_OUT)]
    environment = dict(os.environ, PYTHONIOENCODING="cp1252", PYTHONUTF8="0", OMP_NUM_THREADS="1")
    command = [sys.executable, *OPTIONS, "-c", RUN, platform, str(tiny_model), " ".join(modules)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="cp1252", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = {name: text for name, _, text in (line.partition(": ") for line in done.stdout.splitlines())}
    assert said["refused"] == "['triton'] ['kernels']", "only Triton's kernels need what is not there"
    assert said["memory"] == "True True"
    assert said["cpu"] == "None True"
    assert (said["plain"], said["cached"], said["bound"]) == ("0", "0", "127.0.0.1"), done.stdout + done.stderr
    assert "all on the CPU" in done.stderr and "emulated: 40 slots" in done.stderr, done.stderr


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_oldest_python_can_read_it(file: Path) -> None:
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))
