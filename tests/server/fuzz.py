"""Sends a server whatever its schema allows and forbids: `python -m tests.server.fuzz URL MODEL schema|spoilt COUNT`.

A process of its own, because libraries that a model loads switch subnormal numbers off for the whole process, which
Hypothesis refuses to work with. Prints how often each endpoint answered with which status.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}
Statuses = Counter[str]

# What the schema has and the server refuses, or answers for one model only: set so that more comes through.
SETTLED = (
    "n", "n_cmpl", "best_of", "audio", "functions", "function_call", "web_search_options", "modalities", "tool_choice",
    "response_format", "chat_template_kwargs", "echo", "suffix", "template", "context", "images", "format", "think",
    "tools", "text", "reasoning", "output_config",
)  # fmt: skip

# Endpoints that read the same request as another: tried where there is time.
AS_OTHERS = ("/v1/responses/input_tokens", "/v1/messages/count_tokens")


def send_schema(url: str, model: str, count: int) -> Statuses:
    """Send what schemathesis makes of the published schema, good and bad."""
    statuses: Statuses = Counter()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in AS_OTHERS and count < 50:
            continue
        has_body = operation.method == "post"
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if has_body else (GenerationMode.POSITIVE,):

            @given(case=operation.as_strategy(generation_mode=mode), is_settled=st.booleans())
            @settings(max_examples=count, **CALM)
            def send(case: Any, is_settled: bool) -> None:
                if is_settled and isinstance(case.body, dict):
                    case.body = {name: value for name, value in case.body.items() if name not in SETTLED}
                    case.body["model"] = model
                answer = case.call()
                statuses[f"{operation.path} {answer.status_code}"] += 1  # noqa: B023
                case.validate_response(answer, checks=[not_a_server_error])

            send()
    return statuses


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
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
        "tool_choice": "auto", "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "object", "properties": {"a": {"enum": [1, "b"]}, "c": {"type": "number", "multipleOf": 0.5}}}}},
    },
    "/v1/completions": {"prompt": [1, 2, 3], "stream": False, "max_tokens": 3, "logprobs": 1, "stop": "q",
                        "structured_outputs": {"regex": "a+b", "choice": []}, "n": 2},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "2"}]},
        ],
        "instructions": "be brief", "stream": True, "max_output_tokens": 4, "temperature": 1.0, "top_p": 0.9,
        "include": ["message.output_text.logprobs"], "top_logprobs": 2, "store": True, "parallel_tool_calls": False,
        "tools": [{"type": "function", "name": "f", "parameters": {"properties": {"a": {}}}, "strict": True}],
        "tool_choice": "auto", "reasoning": {"effort": "none", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "is_error": True, "content": [
                    {"type": "text", "text": "2"}]},
                {"type": "text", "text": "well?"}]},
        ],
        "stream": True, "max_tokens": 4, "stop_sequences": ["x"], "temperature": 1.0, "top_p": 0.9, "top_k": 5,
        "tools": [{"name": "f", "input_schema": {"properties": {"a": {}}}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "high"},
    },
    "/api/chat": {
        "messages": [{"role": "user", "content": "hi", "images": []}], "stream": True,
        "options": {"num_predict": 3, "temperature": 0.3, "stop": ["a"]}, "think": False,
        "keep_alive": "5m", "format": {"type": "array", "items": {"type": "integer", "minimum": 3}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    "/api/generate": {"prompt": "hi", "system": "x", "raw": False, "context": [], "options": {}},
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def like(value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same type: many of them are as good, so that something comes through."""
    same: dict[type, st.SearchStrategy[Any]] = {
        bool: st.booleans(), int: st.integers(0, 9), float: st.floats(0, 1), str: st.text(max_size=9),
        list: st.just([]), dict: st.just({}),
    }  # fmt: skip
    return same.get(type(value), st.none())


@st.composite
def spoilt(draw: st.DrawFn, model: str) -> tuple[str, bytes]:
    """A whole request with one or two places replaced, and now and then a byte as well."""
    path = draw(st.sampled_from(sorted(WHOLE)))
    body = json.loads(json.dumps(WHOLE[path])) | {"model": model}
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(sorted(places(body), key=repr)))
        inner = body
        for key in place[:-1]:
            inner = inner[key]
        if place:
            inner[place[-1]] = draw(JSON | like(inner[place[-1]]))
        else:
            body = draw(JSON)
        if not isinstance(body, dict):
            break
    sent = bytearray(json.dumps(body).encode())
    if sent and draw(st.integers(0, 3)) == 0:
        sent[draw(st.integers(0, len(sent) - 1))] = draw(st.integers(0, 255))
    return path, bytes(sent)


def send_spoilt(url: str, model: str, count: int) -> Statuses:
    """Send whole requests with something broken in each."""
    statuses: Statuses = Counter()
    with httpx.Client(base_url=url, timeout=60) as http:

        @given(request=spoilt(model))
        @settings(max_examples=count, **CALM)
        def send(request: tuple[str, bytes]) -> None:
            path, body = request
            answer = http.post(path, content=body)
            statuses[f"{path} {answer.status_code}"] += 1
            assert answer.status_code < 500, answer.text
            if answer.status_code == 200:
                assert "inside the server" not in answer.text
            else:
                error = answer.json()["error"]
                assert isinstance(error, str) if path.startswith("/api/") else error.keys() >= {"message", "type"}
                assert not path.startswith("/v1/messages") or answer.json()["type"] == "error"

        send()
    return statuses


if __name__ == "__main__":
    _, url, model, what, count = sys.argv
    json.dump({"schema": send_schema, "spoilt": send_spoilt}[what](url, model, int(count)), sys.stdout)
