"""Whatever is sent by the published schema or against it, the server answers, and never with a 5xx."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from hybrimoe_kt.host.hf.engine import Engine

from .scripted import ScriptedEngine
from .serving import Serving, serving

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture(scope="module")
def short() -> Iterator[Serving]:
    with serving(ScriptedEngine(), max_new_tokens=3, max_waiting=8) as running:
        yield running


@pytest.fixture(scope="module")
def short_embedded(engine: Engine) -> Iterator[Serving]:
    with serving(engine, max_new_tokens=2) as running:
        yield running


# What the schema has and the server refuses, or answers for one model only: set so that more comes through.
SETTLED = (
    "n", "best_of", "audio", "functions", "function_call", "web_search_options", "modalities", "tool_choice",
    "response_format", "chat_template_kwargs", "echo", "suffix", "template", "context", "images", "format", "think",
)  # fmt: skip


def fuzz(running: Serving, examples: int) -> Counter[tuple[str, int]]:
    """Send what schemathesis makes of the published schema, good and bad; count statuses by endpoint."""
    statuses: Counter[tuple[str, int]] = Counter()
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        has_body = operation.method == "post"
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if has_body else (GenerationMode.POSITIVE,):

            @given(case=operation.as_strategy(generation_mode=mode), is_settled=st.booleans())
            @settings(max_examples=examples, database=None, **CALM)
            def send(case: Any, is_settled: bool) -> None:
                if is_settled and isinstance(case.body, dict):
                    case.body = {name: value for name, value in case.body.items() if name not in SETTLED}
                    case.body["model"] = running.service.model_name
                answer = case.call()
                statuses[operation.path, answer.status_code] += 1  # noqa: B023
                case.validate_response(answer, checks=[not_a_server_error])

            send()
    return statuses


def test_a_few_requests_for_every_endpoint(short: Serving) -> None:
    statuses = fuzz(short, 10)
    for path in WHOLE:
        assert statuses[path, 400] > 0
    assert sum(statuses[path, 200] for path in WHOLE) > 3


@pytest.mark.slow
def test_many_requests_for_every_endpoint(short: Serving) -> None:
    statuses = fuzz(short, 400)
    print(dict(statuses))
    for path in WHOLE:
        assert statuses[path, 200] > 0


@pytest.mark.slow
def test_a_real_model_behind_it(short_embedded: Serving) -> None:
    print(dict(fuzz(short_embedded, 60)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "Ada"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "tool_call_id": "1", "content": "2"},
        ],
        "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4, "temperature": 1.0, "top_p": 0.9,
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "logit_bias": {"3": 1.0}, "seed": 1, "stop": ["x", "y"], "n": 1, "logprobs": True, "top_logprobs": 2,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}],
        "tool_choice": "auto", "response_format": {"type": "text"}, "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/completions": {"prompt": [1, 2, 3], "stream": False, "max_tokens": 3, "logprobs": 1, "stop": "q"},
    "/api/chat": {
        "model": "scripted", "messages": [{"role": "user", "content": "hi", "images": []}], "stream": True,
        "options": {"num_predict": 3, "temperature": 0.3, "stop": ["a"]}, "format": "", "think": False,
        "keep_alive": "5m",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    "/api/generate": {"model": "scripted", "prompt": "hi", "system": "x", "raw": False, "context": [], "options": {}},
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[str, bytes]:
    """A whole request with one or two places replaced, and now and then a byte as well."""
    path = draw(st.sampled_from(sorted(WHOLE)))
    body = json.loads(json.dumps(WHOLE[path]))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(sorted(places(body), key=repr)))
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        if place:
            inner[place[-1]] = draw(JSON)
        else:
            body = draw(JSON)
        if not isinstance(body, dict):
            break
    sent = bytearray(json.dumps(body).encode())
    if sent and draw(st.integers(0, 3)) == 0:
        sent[draw(st.integers(0, len(sent) - 1))] = draw(st.integers(0, 255))
    return path, bytes(sent)


@given(request_=spoilt())
@settings(max_examples=120, **CALM)
def test_spoilt_requests(short: Serving, request_: tuple[str, bytes]) -> None:
    check_spoilt(short, *request_)


@pytest.mark.slow
@given(request_=spoilt())
@settings(max_examples=4000, **CALM)
def test_many_spoilt_requests(short: Serving, request_: tuple[str, bytes]) -> None:
    check_spoilt(short, *request_)


def check_spoilt(running: Serving, path: str, body: bytes) -> None:
    answer = running.http.post(path, content=body)
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert isinstance(error, str) if path.startswith("/api/") else error.keys() >= {"message", "type"}
    else:
        assert "inside the server" not in answer.text


def test_every_whole_request_is_answered(short: Serving) -> None:
    """Or else spoiling them would try nothing."""
    for path, body in WHOLE.items():
        answer = short.post(path, body)
        assert answer.status_code == 200, answer.text
