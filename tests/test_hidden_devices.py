"""An ordinary run of the tests is the same on a machine with a GPU: it does not see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import is_for_devices

ROOT = Path(__file__).parents[1]
RUN = """
import json, os, sys
for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRITON_INTERPRET"):
    os.environ.pop(name, None)
import functools, hypothesis, pytest, torch
sees = lambda: {os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")} != {"-1"}
torch.cuda.is_available = functools.cache(sees)  # a machine with a GPU; as in torch, the first answer stays
for probe, expression in json.loads(sys.argv[2]):
    child = os.fork()  # so that torch is imported once; nothing has been asked or decided by then
    if not child:
        printed = os.open(probe + ".printed", os.O_CREAT | os.O_WRONLY)
        os.dup2(printed, 1)
        options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "tests.conftest", "-c", sys.argv[1], probe]
        code = pytest.main(options + (["-m", expression] if expression else []))
        sys.stdout.flush()
        os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        os.rename(probe + ".printed", probe + ".failed")
"""
PROBE = """
import subprocess, sys
import pytest
from tests.kernels.layers import DEVICE

CHILD = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('TRITON_INTERPRET'))"

{marks}
def test_probe():
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    print("found:", DEVICE, child)
"""


CASES = {
    "all": ("", "", "cpu -1 1"),
    "ordinary": ("", "not slow and not gpu", "cpu -1 1"),
    "slow": ("@pytest.mark.slow", "slow", "cpu -1 1"),
    "devices": ("@pytest.mark.kernels", "(gpu or kernels) and not slow", "cuda None None"),
}
"""Of each case the probe's marks, the run's `-m`, and what the probe and a process that it starts find."""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every case's probe, run."""
    folder = tmp_path_factory.mktemp("probes")
    files = {name: folder / name / "test_probe.py" for name in CASES}
    for name, (marks, _, _) in CASES.items():
        files[name].parent.mkdir()
        files[name].write_text(PROBE.format(marks=marks), encoding="utf-8")
    given = [(str(files[name]), expression) for name, (_, expression, _) in CASES.items()]
    command = [sys.executable, "-c", RUN, str(ROOT / "pyproject.toml"), json.dumps(given)]
    subprocess.run(command, check=True, cwd=ROOT)
    return files


@pytest.mark.parametrize("name", CASES)
def test_only_a_run_for_devices_sees_them(probes: dict[str, Path], name: str) -> None:
    """Nor do processes that tests start see more, and nobody asks before it is decided."""
    printed = probes[name].with_name("test_probe.py.printed")
    assert printed.is_file(), probes[name].with_name("test_probe.py.failed").read_text(encoding="utf-8")
    assert f"found: {CASES[name][2]}" in printed.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("", False),
        ("not slow", False),
        ("gpu", True),
        ("not gpu", False),
        ("gpu and slow", False),
        ("slow or gpu", True),
        ("gpu and (", False),
    ],
)
def test_the_expression_is_read_as_pytest_reads_it(expression: str, wanted: bool) -> None:
    assert is_for_devices(expression) == wanted
