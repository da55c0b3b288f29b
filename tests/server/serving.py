"""Servers for tests: in a thread of this process, or as a user starts them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from hybrimoe_kt.server.run import Server, address_of, bind
from hybrimoe_kt.server.service import Service
from hybrimoe_kt.server.settings import Settings

ROOT = Path(__file__).parents[2]


class Serving:
    """A running server: its `url`, a plain HTTP client, and the service behind it."""

    def __init__(self, service: Service, server: Server, url: str) -> None:
        self.service, self.server, self.url = service, server, url
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, path: str, body: Any = None, **how: Any) -> httpx.Response:
        return self.http.post(path, json=body, **how)

    def ask(self, text: str, **more: Any) -> httpx.Response:
        """One message, `max_tokens` and so on besides."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})


@contextlib.contextmanager
def serving(engine: Any, **options: Any) -> Iterator[Serving]:
    """Serve `engine` on a free port until the block ends."""
    settings = Settings(**{"port": 0, "shutdown_s": 60.0, "temperature": 0.0} | options)
    listener = bind(settings)
    is_ready = threading.Event()
    service = Service(engine, settings)
    server = Server(service, is_ready.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    assert is_ready.wait(20), "the server did not start"
    running = Serving(service, server, address_of(settings, listener))
    try:
        yield running
    finally:
        running.http.close()
        server.drain()
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def eventually(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether something becomes so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if is_so():
            return True
        time.sleep(0.01)
    return is_so()


class ServerProcess:
    """`ktransformers --port 0 ...` in a process of its own, ready when made."""

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hybrimoe_kt", "--port", "0", *map(str, arguments)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"serving at (\S+) ", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr or ()), daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024
