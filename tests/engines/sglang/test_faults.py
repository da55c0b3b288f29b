"""A step that fails while SGLang serves costs its requests alone, and the prefix cache keeps nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; docs/engines.md")

from tests.engines.vllm.faulty import FAULT_FILE
from tests.engines.vllm.offline import prompts
from tests.engines.vllm.server import Server, free_port, stop

from .offline import ENGINE, ENVIRONMENT, TWO_RANKS, hybrimoe

Make = Callable[..., tuple[Path, Path]]
FAULTY = {"accelerator": "none", "cpu_backend": "tests.engines.vllm.faulty:FaultyBackend"}
RANKS: dict[str, dict[str, Any]] = {"one process": {}, "expert parallel 2": {"tp_size": 2, "ep_size": 2}}


@contextmanager
def serving(model: Path, folder: Path, env: dict[str, str], **engine: Any) -> Iterator[Server]:
    """A server of `model`; stopped with everything it has started."""
    port, log = free_port(), folder / "server.log"
    given = ENGINE | hybrimoe(FAULTY) | engine | {"port": port, "skip_tokenizer_init": True}
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    for name, value in given.items():
        if value is not False:
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | ENVIRONMENT | env, stdout=output, stderr=output
        )
    server = Server(port, process, log)
    try:
        until = time.monotonic() + 300
        while not server.is_up():
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)
        yield server
    finally:
        stop(server)


def complete(server: Server, prompt: list[int], tokens: int = 12) -> list[int]:
    """Greedy token ids behind a prompt of token ids; HTTPError for an error."""
    wanted = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    found: list[int] = server.post("/generate", {"input_ids": prompt, "sampling_params": wanted})["output_ids"]
    return found


def failed(server: Server, prompt: list[int]) -> bool:
    """Whether a long answer ends with an error."""
    try:
        complete(server, prompt, 120)
    except urllib.error.HTTPError as error:
        return error.code == 500
    return False


@pytest.mark.parametrize("ranks", RANKS)
def test_a_step_that_fails_costs_its_requests_alone(family: Make, tmp_path: Path, ranks: str) -> None:
    fault, given = tmp_path / "fault", prompts(256)[4:]
    env = {FAULT_FILE: str(fault)} | (TWO_RANKS if ranks != "one process" else {})
    engine = {"disable_radix_cache": False, **RANKS[ranks]}
    with serving(family("qwen3moe")[1], tmp_path, env, **engine) as server, ThreadPoolExecutor(4) as pool:
        wanted = [complete(server, prompt) for prompt in given]
        longer = [prompt * 2 for prompt in given]
        for prompt in longer:  # the prompt itself is lost, and what may be kept of it
            fault.touch()
            assert failed(server, prompt), server.log.read_text()[-3000:]
            assert not fault.exists()
        asked = [pool.submit(failed, server, prompt) for prompt in longer]
        time.sleep(0.5)
        fault.touch()
        assert any(each.result() for each in asked), server.log.read_text()[-3000:]
        assert not fault.exists()
        answers = [complete(server, prompt) for prompt in longer]
        assert [complete(server, prompt) for prompt in given] == wanted
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/flush_cache?timeout=30", b"", timeout=60):
            assert [complete(server, prompt) for prompt in longer] == answers, "nothing wrong was kept"
        assert server.is_up()
        assert "injected; the requests of this step are lost" in server.log.read_text()
