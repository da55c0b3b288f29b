"""Many clients at once: nothing is lost, nothing mixed up, and nothing stays behind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from hybrimoe_kt.engine.engine import Engine

from .scripted import ScriptedEngine
from .serving import ROOT, ServerProcess, eventually, serving

WORDS = ("mountain", "river", "bread", "winter", "music", "letter", "garden", "window", "silver", "morning", "thunder")


def question(number: int) -> dict[str, Any]:
    """Each its own beginning, so that an answer tells which question it belongs to; seeded, and of every kind."""
    draw = random.Random(number)
    text = f"{number} {' '.join(draw.choices(WORDS, k=6))}?"
    kind = number % 7
    body: dict[str, Any] = {"temperature": 1.8 if number % 8 else 0, "seed": number}
    if kind in (0, 1):
        return {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": text}], "max_tokens": 6,
                "stream": kind == 1} | body  # fmt: skip
    if kind == 2:
        return {"path": "/v1/completions", "prompt": text, "max_tokens": 6} | body
    if kind == 5:
        return {"path": "/v1/responses", "input": text, "max_output_tokens": 6, "temperature": body["temperature"],
                "seed": number}  # fmt: skip
    if kind == 6:
        messages = [{"role": "user", "content": text}]
        return {"path": "/v1/messages", "model": "small-talk", "messages": messages, "max_tokens": 6, "temperature": 0}
    options = body | {"num_predict": 6}
    if kind == 3:
        messages = [{"role": "user", "content": text}]
        return {"path": "/api/chat", "model": "small-talk", "messages": messages, "options": options}
    return {"path": "/api/generate", "model": "small-talk", "prompt": text, "stream": False, "options": options}


def ask(http: httpx.Client, asked: dict[str, Any], attempts: int = 500) -> str:
    """Return the answer's text, coming back when the queue is full."""
    body = dict(asked)
    path = body.pop("path")
    for _ in range(attempts):
        answer = http.post(path, json=body)
        if answer.status_code != 429:
            break
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.2)
    assert answer.status_code == 200, answer.text
    return text_of(path, body.get("stream", path.startswith("/api/")), answer.text)


def text_of(path: str, stream: bool, said: str) -> str:
    if path.startswith("/api/"):
        parts = [json.loads(line) for line in said.splitlines()]
        assert parts[-1]["done"]
        return "".join(part["message"]["content"] if "message" in part else part["response"] for part in parts)
    if path in ("/v1/responses", "/v1/messages"):
        said_parts = json.loads(said)["output"][-1]["content"] if "responses" in path else json.loads(said)["content"]
        return "".join(part["text"] for part in said_parts)
    if not stream:
        choice = json.loads(said)["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    lines = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])


def flood(url: str, count: int, clients: int) -> list[str]:
    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(base_url=url, timeout=1200, limits=limits) as http, ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda number: ask(http, question(number)), range(count)))


def test_a_dozen_at_once_get_what_each_would_alone(engine: Engine) -> None:
    with serving(engine, max_waiting=8) as running:
        together = flood(running.url, 12, 12)
        alone = [ask(running.http, question(number)) for number in range(12)]
    assert together == alone
    assert len(set(alone)) > 9


def test_clients_that_break_off_leave_nothing_behind() -> None:
    """Half of sixty clients leave in the middle; the others get their own answer, and the server is idle after."""
    with serving(ScriptedEngine(), max_waiting=100) as running:

        def one(number: int) -> bool:
            body = {"messages": [{"role": "user", "content": f"client {number} " + "x" * 300}], "stream": True}
            with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if number % 2:
                    next(answer.iter_lines())
                    return True
                answer.read()
                said = text_of("/v1/chat/completions", True, answer.text)
            return said == f"echo: client {number} " + "x" * 300

        with ThreadPoolExecutor(20) as pool:
            assert all(pool.map(one, range(60)))
        assert eventually(lambda: running.service.queue.num_active + running.service.queue.num_waiting == 0)


@pytest.mark.slow
def test_two_hundred_at_once_from_another_process() -> None:
    """Compared with a sequential run on the same server; its memory after the third round is that after the first."""
    with ServerProcess("--max_waiting", "220", "--accelerator", "none") as server:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            alone = [ask(http, question(number)) for number in range(200)]
        assert len(set(alone)) > 150
        resident = []
        for _ in range(3):
            code = (
                "import json, sys; from tests.server.test_load import flood; "
                f"json.dump(flood({server.url!r}, 200, 200), sys.stdout)"
            )
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            assert json.loads(done.stdout) == alone
            resident.append(server.resident_bytes())
        print(f"resident after each round of 200: {[round(size / 2**20, 1) for size in resident]} MiB")
        assert resident[2] - resident[0] < 16 * 2**20
        with httpx.Client(base_url=server.url, timeout=120) as http:
            queue = http.get("/hybrimoe/stats").json()["queue"]
            assert (queue["active"], queue["waiting"]) == (0, 0)
