"""`vllm serve` as a process of a test."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from .offline import _IN_PROCESS, ENVIRONMENT, ROOT

COMMAND = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
ARGUMENTS = [  # ranks of a pipeline have to be warmed up, which vLLM does of compiled models alone
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8",
    "--compilation-config", '{"mode": 2, "backend": "eager"}',
    "--kv-cache-memory-bytes", str(2**26), "--gpu-memory-utilization", "0.2",
]  # fmt: skip


class Server:
    """One that answers."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer; HTTPError for an error."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def complete(self, model: str, prompt: Sequence[int], tokens: int = 12) -> list[int]:
        """Greedy token ids behind a prompt of token ids."""
        body = {
            "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        found: list[int] = self.post("/v1/completions", body)["choices"][0]["token_ids"]
        return found

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def processes(self) -> list[psutil.Process]:
        """It and all that it has started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def started(
    model: Path,
    folder: Path,
    *arguments: str,
    options: dict[str, Any],
    env: dict[str, str] | None = None,
    port: int = 0,
) -> Iterator[Server]:
    """A server of `model` that need not answer yet, or ever; stopped with everything it has started."""
    port, log = port or free_port(), folder / f"server-{time.monotonic_ns()}.log"
    command = [*COMMAND, str(model), "--port", str(port), *ARGUMENTS, *arguments]
    command += ["--additional-config", json.dumps({"hybrimoe": options})]
    given = {name: value for name, value in os.environ.items() if name not in _IN_PROCESS}
    given |= ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | (env or {})
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=given, stdout=output, stderr=output)
    server = Server(port, process, log)
    try:
        yield server
    finally:
        stop(server)


@contextmanager
def serving(model: Path, folder: Path, *arguments: str, **given: Any) -> Iterator[Server]:
    """The same, once it answers."""
    with started(model, folder, *arguments, **given) as server:
        until = time.monotonic() + 240
        while not server.is_up():
            assert server.process.poll() is None, server.log.read_text()[-4000:]
            assert time.monotonic() < until, server.log.read_text()[-4000:]
            time.sleep(0.5)
        yield server


def stop(server: Server) -> None:
    """Ask it to end, and see to it."""
    try:
        started = server.processes()
    except psutil.NoSuchProcess:
        return
    server.process.terminate()
    _, alive = psutil.wait_procs(started, timeout=30)
    for process in alive:
        process.kill()
    server.process.wait(10)
