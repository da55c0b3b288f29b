"""The recipe of docs/replicas.md: two servers behind the smg router."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .serving import ROOT, ServerProcess, eventually

SMG = shutil.which("smg") or str(ROOT / ".cache" / "smg" / "bin" / "smg")
KEY = "secret"
SUBJECTS = ("hills", "the sea", "music", "old trains", "bread", "winter birds", "glass", "a long walk", "letters")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access(SMG, os.X_OK), reason="no smg: run make .cache/smg"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def router(log: Path, *workers: str) -> Iterator[str]:
    """smg in front of `workers`, as the recipe starts it but for the ports and the pace of its health checks."""
    port, metrics = free_port(), free_port()
    command = [
        SMG, "launch", "--host", "127.0.0.1", "--port", str(port), "--policy", "cache_aware", "--api-key", KEY,
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--health-check-interval-secs", "1",
        "--worker-startup-check-interval", "1",
        "--balance-abs-threshold", "4", "--worker-urls", *workers,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        assert eventually(lambda: knows_model(url), 60), log.read_text(encoding="utf-8")
        yield url
    finally:
        process.kill()
        process.wait(20)


def knows_model(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return "tiny" in httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}).text
    return False


def answered(server: ServerProcess) -> float:
    """Answers this server has given."""
    told = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(float(count) for count in re.findall(r"^hybrimoe_answers_total\{.*\} (\S+)$", told, re.MULTILINE))


class Talk:
    """A conversation through the router that remembers which servers answered it."""

    def __init__(self, url: str, subject: str) -> None:
        self.url = url
        text = f"Let us talk about {subject}, at some length, and calmly: what do you know of {subject}?"
        self.messages = [{"role": "user", "content": text}]
        self.homes: set[int] = set()

    def go_on(self, servers: list[ServerProcess] | None = None) -> None:
        before = [answered(server) for server in servers or ()]
        answer = httpx.post(
            f"{self.url}/v1/chat/completions",
            json={"model": "tiny", "messages": self.messages, "max_tokens": 6, "temperature": 0},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        for number, server in enumerate(servers or ()):
            if answered(server) > before[number]:
                self.homes.add(number)
        content = answer.json()["choices"][0]["message"]["content"]
        self.messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "Go on, please."}]


def test_conversations_stay_where_they_are_and_outlive_a_server(tmp_path: Path) -> None:
    options = ("--model_name", "tiny", "--api_key", KEY, "--accelerator", "none")
    with ServerProcess(*options) as first, ServerProcess(*options) as second:
        servers = [first, second]
        with router(tmp_path / "smg.log", first.url, second.url) as url:
            refused = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": []})
            assert refused.status_code == 401
            talks = [Talk(url, subject) for subject in SUBJECTS]
            for _ in range(3):
                for talk in talks:
                    talk.go_on(servers)
            assert [len(talk.homes) for talk in talks] == [1] * len(talks)
            assert {home for talk in talks for home in talk.homes} == {0, 1}, "one server did all the work"

            first.process.send_signal(signal.SIGKILL)
            first.process.wait(20)
            for _ in range(3):
                for talk in talks:
                    talk.go_on()
            assert answered(second) >= 3 * len(talks)
