"""What goes wrong while vLLM serves: a step that fails, and a server that is killed."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from .faulty import FAULT_FILE
from .offline import prompts
from .server import Server, free_port, serving

Make = Callable[..., tuple[Path, Path]]
RANKS = {
    "one process": (),
    "expert parallel 2": ("--tensor-parallel-size", "2", "--enable-expert-parallel"),
    "pipeline parallel 2": ("--pipeline-parallel-size", "2"),
}
ONE_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
FAULTY = {"accelerator": "none", "cpu_backend": "tests.engines.vllm.faulty:FaultyBackend"}


def failed(server: Server, prompt: list[int]) -> bool:
    """Whether a long answer ends with an error."""
    try:
        server.complete("model", prompt, 120)
    except urllib.error.HTTPError as error:
        return error.code == 500
    return False


@pytest.mark.parametrize("ranks", RANKS)
def test_a_step_that_fails_costs_its_requests_alone(family: Make, tmp_path: Path, ranks: str) -> None:
    """Also with a prefix cache, which must not keep what a failed step has written."""
    fault, given = tmp_path / "fault", prompts(256)[4:]
    env = {FAULT_FILE: str(fault)} | (ONE_CORE_EACH if ranks != "one process" else {})
    file = family("qwen2moe")[1]
    with (
        serving(
            file,
            tmp_path,
            *RANKS[ranks],
            "--served-model-name",
            "model",
            "--enable-prefix-caching",
            options=FAULTY,
            env=env,
        ) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        wanted = [server.complete("model", prompt) for prompt in given]
        for _ in range(2):
            longer = [prompt * 2 for prompt in given]
            asked = [pool.submit(failed, server, prompt) for prompt in longer]
            time.sleep(1.0)
            fault.touch()
            assert any(each.result() for each in asked), server.log.read_text()[-3000:]
            assert not fault.exists()
            assert [server.complete("model", prompt) for prompt in given] == wanted
            assert [server.complete("model", prompt, 4) for prompt in longer]
            assert server.is_up()
        text = server.log.read_text()
        assert "injected; the requests of this step are lost" in text
        assert "EngineDeadError" not in text


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_server_that_was_killed(family: Make, tmp_path: Path, how: signal.Signals) -> None:
    """No process, and so no page that one has locked, and no shared memory; the next answers at the same port."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("no /dev/shm on this system")
    file, port, before = family("qwen3moe")[1], free_port(), set(os.listdir(shared))
    options = {"accelerator": "emulated", "cache_size": "25%", "host_store": "page_locked"}
    answers = []
    for _ in range(2):
        with serving(
            file, tmp_path, *RANKS["expert parallel 2"], options=options, env=ONE_CORE_EACH, port=port
        ) as server:
            answers.append(server.complete(str(file), prompts(256)[2]))
            started = server.processes()
            assert len(started) >= 4, "the server, the engine and two ranks"
            its_own = set(os.listdir(shared)) - before
            server.process.send_signal(how)
            _, alive = psutil.wait_procs(started, timeout=60)
            assert not alive, [process.cmdline() for process in alive]
            assert its_own.isdisjoint(os.listdir(shared))
    assert answers[0] == answers[1]
