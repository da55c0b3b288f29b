"""Answers in the order asked, one at a time or several; a full queue, a cancelled request and an ending server."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from .scripted import ScriptedEngine
from .serving import Serving, eventually, serving
from .test_refusals import shape


class Held:
    """Lets no token through until `go`; counts answers that run at the same time."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = 0

    def __call__(self, number: int, stop: threading.Event) -> None:
        while not self.go.wait(0.005) and not stop.is_set():
            pass


def queue_of(running: Serving) -> dict[str, int]:
    queue = dict(running.http.get("/hybrimoe/stats").json()["queue"])
    assert queue.pop("parallel") == running.service.engine.parallel
    return queue


def test_requests_are_answered_in_the_order_they_came() -> None:
    held = Held()
    engine = ScriptedEngine(before_token=held)
    with serving(engine) as running, ThreadPoolExecutor(6) as pool:
        answers = []
        for number in range(6):
            answers.append(pool.submit(running.ask, f"number {number}"))
            assert eventually(lambda: sum(queue_of(running).values()) - 64 == len(answers))
        assert queue_of(running) == {"active": 1, "waiting": 5, "limit": 64}
        held.go.set()
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
        assert texts == [f"echo: number {number}" for number in range(6)]
        assert [prompt.count(f"number {number}") for number, prompt in enumerate(engine.prompts)] == [1] * 6
        assert queue_of(running) == {"active": 0, "waiting": 0, "limit": 64}


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    held = Held()
    with serving(ScriptedEngine(before_token=held), max_waiting=2) as running, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(running.ask, "hi", stream=number == 1) for number in range(3)]
        assert eventually(lambda: queue_of(running)["waiting"] == 2)
        for stream in (False, True):
            refused = running.ask("hi", stream=stream)
            assert refused.status_code == 429
            assert shape(refused)["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        refused = running.post("/api/generate", {"model": "scripted", "prompt": "hi"})
        assert refused.status_code == 429
        assert "waiting already" in refused.json()["error"]
        held.go.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert running.ask("again").status_code == 200


def test_a_queue_without_room_still_answers_one_after_the_other() -> None:
    with serving(ScriptedEngine(), max_waiting=0) as running:
        assert [running.ask("hi").status_code for _ in range(20)] == [200] * 20


class Parallel(ScriptedEngine):
    """Two answers at once."""

    parallel = 2


def test_two_are_answered_at_once_and_the_third_when_one_has_ended() -> None:
    held = Held()
    with serving(Parallel(before_token=held)) as running, ThreadPoolExecutor(3) as pool:
        answers = []
        for number, (active, waiting) in enumerate([(1, 0), (2, 0), (2, 1)]):
            answers.append(pool.submit(running.ask, f"number {number}"))
            wanted = {"active": active, "waiting": waiting, "limit": 64}
            if number == 0:
                assert eventually(lambda: queue_of(running) == wanted)  # noqa: B023
                continue
            # the thread that steps is held in the middle of a step: it admits the others once that has ended
            assert eventually(lambda: sum(queue_of(running).values()) - 64 == number + 1)  # noqa: B023
        held.go.set()
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
        assert texts == [f"echo: number {number}" for number in range(3)]
        told = running.http.get("/metrics").text
        assert 'hybrimoe_batch_size_bucket{le="2.0"}' in told
        assert "hybrimoe_parallel 2.0" in told
        assert "hybrimoe_first_token_seconds_count 3.0" in told


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", [ScriptedEngine, Parallel])
def test_answers_of_one_request_are_told_in_their_order(engine: type[ScriptedEngine], stream: bool) -> None:
    """Also where a later one has ended first."""
    prompts = ["a long one, " * 4, "b", "", "c"]
    with serving(engine(lambda prompt: prompt or "nothing")) as running:
        body = {"model": "scripted", "prompt": [text or "?" for text in prompts], "stream": stream}
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            answer = client.completions.create(**body)
            if stream:
                texts, seen = [""] * 4, []
                for chunk in answer:
                    texts[chunk.choices[0].index] += chunk.choices[0].text
                    seen.append(chunk.choices[0].index)
                assert seen == sorted(seen)
            else:
                texts = [choice.text for choice in answer.choices]
    assert texts == [text or "?" for text in prompts]


def test_one_that_fails_beside_others_fails_alone() -> None:
    def script(prompt: str) -> str:
        if "bad" in prompt:
            raise ValueError("this one is broken")
        return "fine"

    with serving(Parallel(script)) as running, ThreadPoolExecutor(4) as pool:
        texts = ["good", "bad", "good", "bad"]
        statuses = [answer.status_code for answer in pool.map(running.ask, texts)]
    assert statuses == [200, 500, 200, 500]


def test_one_client_is_limited_and_told_so() -> None:
    held = Held()
    with serving(Parallel(before_token=held), max_per_client=2) as running, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(running.ask, "hi") for _ in range(2)]
        assert eventually(lambda: sum(queue_of(running).values()) == 64 + 2)
        refused = running.ask("hi")
        assert refused.status_code == 429
        assert shape(refused)["code"] == "client_limit"
        assert int(refused.headers["retry-after"]) >= 1
        held.go.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert running.ask("hi").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/api/chat"])
def test_a_client_that_leaves_frees_its_place(path: str, stream: bool) -> None:
    """Also while its prompt is read, when no token has come yet, and while it waits."""
    held = Held()
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "scripted", "prompt": "hi", "messages": messages, "stream": stream}
    with serving(ScriptedEngine(before_token=held)) as running:
        clients = []
        for number in range(3):
            clients.append(_begin(running, path, json.dumps(body)))
            assert eventually(lambda: queue_of(running) == {"active": 1, "waiting": number, "limit": 64})  # noqa: B023
        clients[2].close()
        assert eventually(lambda: queue_of(running) == {"active": 1, "waiting": 1, "limit": 64})
        clients[0].close()
        assert eventually(lambda: queue_of(running) == {"active": 1, "waiting": 0, "limit": 64})
        clients[1].close()
        assert eventually(lambda: queue_of(running) == {"active": 0, "waiting": 0, "limit": 64})
        held.go.set()
        assert running.ask("still there?").json()["choices"][0]["message"]["content"] == "echo: still there?"


def _begin(running: Serving, path: str, body: str) -> socket.socket:
    """Send a request and do not wait for its answer."""
    raw = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
    raw.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return raw


def test_what_was_accepted_ends_and_what_is_new_is_refused() -> None:
    held = Held()
    with serving(ScriptedEngine(before_token=held)) as running, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(running.ask, f"number {number}") for number in range(2)]
        assert eventually(lambda: queue_of(running) == {"active": 1, "waiting": 1, "limit": 64})
        ending = pool.submit(running.server.drain)
        assert eventually(lambda: running.service.is_shutting_down)
        refused = running.ask("too late")
        assert refused.status_code == 503
        assert shape(refused)["code"] == "shutting_down"
        assert running.http.get("/health").status_code == 503
        assert running.http.get("/v1/models").status_code == 200
        held.go.set()
        texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
        assert texts == ["echo: number 0", "echo: number 1"]
        ending.result()
        assert running.server.has_answered_all


def test_past_the_deadline_answers_are_cut_short() -> None:
    held = Held()
    with serving(ScriptedEngine(before_token=held), shutdown_s=0.2) as running, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(running.ask, "hi", stream=number == 0) for number in range(2)]
        assert eventually(lambda: queue_of(running)["waiting"] == 1)
        running.server.drain()
        assert not running.server.has_answered_all
        streamed, whole = (answer.result() for answer in answers)
        assert "shutting down" in streamed.text
        assert "[DONE]" not in streamed.text
        assert whole.status_code == 503
        assert shape(whole)["code"] == "shutting_down"


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrimoe_kt.server.streams.PING_S", 0.05)
    held = Held()
    with serving(ScriptedEngine(before_token=held)) as running:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        with running.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                if lines.count(": waiting") == 3:
                    held.go.set()
        assert lines[-2] == "data: [DONE]"
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            held.go.clear()
            stream = client.chat.completions.create(model="scripted", messages=body["messages"], stream=True)
            threading.Timer(0.3, held.go.set).start()
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "echo: hi"
