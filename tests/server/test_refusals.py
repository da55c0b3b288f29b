"""Requests that cannot be answered: the right status, OpenAI's shape, and a sentence that says what is wrong."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from .scripted import ScriptedEngine
from .serving import Serving, serving

CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
SAY = [{"role": "user", "content": "hi"}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f"}}


def shape(answer: Any) -> dict[str, Any]:
    """The error, after checking that it is one of OpenAI's."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


BAD = {
    "no messages": (CHAT, {}, "messages"),
    "empty messages": (CHAT, {"messages": []}, "messages"),
    "messages a text": (CHAT, {"messages": "hi"}, "messages"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    "unknown role": (CHAT, {"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
    "an image": (
        CHAT,
        {"messages": [*SAY, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[1].content[0].type",
    ),
    "negative max_tokens": (CHAT, {"messages": SAY, "max_tokens": -5}, "max_tokens"),
    "max_tokens not whole": (CHAT, {"messages": SAY, "max_tokens": 10.5}, "max_tokens"),
    "max_tokens a text": (CHAT, {"messages": SAY, "max_tokens": "many"}, "max_tokens"),
    "max_tokens true": (CHAT, {"messages": SAY, "max_tokens": True}, "max_tokens"),
    "negative max_completion_tokens": (CHAT, {"messages": SAY, "max_completion_tokens": -3}, "max_completion_tokens"),
    "temperature": (CHAT, {"messages": SAY, "temperature": 2.5}, "temperature"),
    "top_p": (CHAT, {"messages": SAY, "top_p": -0.1}, "top_p"),
    "top_k": (CHAT, {"messages": SAY, "top_k": -2}, "top_k"),
    "min_p": (CHAT, {"messages": SAY, "min_p": 1.5}, "min_p"),
    "repetition_penalty": (CHAT, {"messages": SAY, "repetition_penalty": 0}, "repetition_penalty"),
    "frequency_penalty": (CHAT, {"messages": SAY, "frequency_penalty": 3}, "frequency_penalty"),
    "seed too large": (CHAT, {"messages": SAY, "seed": 2**64}, "seed"),
    "n": (CHAT, {"messages": SAY, "n": 17}, "n"),
    "n twice": (CHAT, {"messages": SAY, "n": 2, "n_cmpl": 3}, "n_cmpl"),
    "more drawn than given": (CHAT, {"messages": SAY, "n": 2, "best_of": 3}, "best_of"),
    "n zero": (CHAT, {"messages": SAY, "n": 0}, "n"),
    "stop a number": (CHAT, {"messages": SAY, "stop": 5}, "stop"),
    "biases in threes": (CHAT, {"messages": SAY, "logit_bias": [[1, 2, 3]]}, "logit_bias"),
    "a text's bias": (CHAT, {"messages": SAY, "logit_bias": [["hello", 1]]}, "logit_bias"),
    "a function called of old": (CHAT, {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]},
                                 "messages[0].function_call"),
    "too many stops": (CHAT, {"messages": SAY, "stop": ["x"] * 17}, "stop"),
    "logit_bias": (CHAT, {"messages": SAY, "logit_bias": {"1": 101}}, "logit_bias.1"),
    "top_logprobs alone": (CHAT, {"messages": SAY, "top_logprobs": 2}, "top_logprobs"),
    "too many logprobs": (CHAT, {"messages": SAY, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "response_format": (CHAT, {"messages": SAY, "response_format": {"type": "xml"}}, "response_format"),
    "a schema of no type": (CHAT, {"messages": SAY, "json_schema": {"type": "strin"}}, "response_format"),
    "two forms": (CHAT, {"messages": SAY, "guided_regex": "a", "grammar": "root ::= \"a\""}, "guided_regex"),
    "an unknown choice": (CHAT, {"messages": SAY, "tools": [TOOL], "tool_choice": "must"}, "tool_choice"),
    "a choice of nothing": (CHAT, {"messages": SAY, "tool_choice": "required"}, "tool_choice"),
    "another tool": (CHAT, {"messages": SAY, "tools": [TOOL], "tool_choice": {"type": "function", "function":
                     {"name": "g"}}}, "tool_choice"),
    "no tools allowed": (CHAT, {"messages": SAY, "tools": [TOOL], "tool_choice": {"type": "allowed_tools"}},
                         "tool_choice"),
    "tool without name": (CHAT, {"messages": SAY, "tools": [TOOL | {"function": {}}]}, "tools[0].function.name"),
    "functions": (CHAT, {"messages": SAY, "functions": [{"name": "f"}]}, "functions"),
    "audio": (CHAT, {"messages": SAY, "modalities": ["audio"], "audio": {"voice": "x"}}, "audio"),
    "arguments not JSON": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    "template option": (CHAT, {"messages": SAY, "chat_template_kwargs": {"wisdom": True}}, "chat_template_kwargs"),
    "template option of ours": (CHAT, {"messages": SAY, "chat_template_kwargs": {"messages": []}}, None),
    "half a surrogate pair": (CHAT, {"messages": [{"role": "user", "content": "\ud83d"}]}, None),
    "no prompt": (PLAIN, {}, "prompt"),
    "empty prompt": (PLAIN, {"prompt": ""}, "prompt"),
    "no tokens": (PLAIN, {"prompt": []}, "prompt"),
    "a token too large": (PLAIN, {"prompt": [10**30]}, "prompt"),
    "no token among prompts": (PLAIN, {"prompt": [[1], []]}, "prompt"),
    "negative token": (PLAIN, {"prompt": [-1, 1]}, "prompt[0]"),
    "suffix": (PLAIN, {"prompt": "a", "suffix": "b"}, "suffix"),
    "best_of": (PLAIN, {"prompt": "a", "best_of": 3}, "best_of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_parameter_is_named(echoing: Serving, case: str) -> None:
    path, body, param = BAD[case]
    answer = echoing.http.post(path, content=json.dumps(body))
    error = shape(answer)
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


BODIES = {
    "no body": b"",
    "not JSON": b"{'messages'",
    "not UTF-8": b'{"messages":[{"role":"user","content":"\xff\xfe"}]}',
    "a list": b"[1, 2]",
    "null": b"null",
    "nested too deeply": b"[" * 100_000,
    "an object nested too deeply": b'{"a":' * 100_000,
    "a number too long": b'{"max_tokens": ' + b"9" * 6000 + b"}",
    "not a number": b'{"messages":[{"role":"user","content":"hi"}],"temperature":NaN}',
    "infinity": b'{"messages":[{"role":"user","content":"hi"}],"temperature":1e999}',
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_a_broken_body_is_refused(echoing: Serving, case: str, path: str) -> None:
    answer = echoing.http.post(path, content=BODIES[case], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    shape(answer)


def test_a_body_without_a_content_type_is_json(echoing: Serving) -> None:
    for headers in ({}, {"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": "text/plain"}):
        answer = echoing.http.post(CHAT, content=json.dumps({"messages": SAY}), headers=headers)
        assert answer.json()["choices"][0]["message"]["content"] == "echo: hi"


def test_unknown_places_methods_and_models(echoing: Serving) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", "/v1/responses", 405),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/settings.py", 404),
    ):
        answer = echoing.http.request(method, path)
        assert answer.status_code == status, path
        shape(answer)
    answer = echoing.post(CHAT, {"model": "gpt-4", "messages": SAY})
    assert answer.status_code == 404
    assert shape(answer)["code"] == "model_not_found"
    assert "'scripted'" in shape(answer)["message"]


def test_a_prompt_beyond_the_context_says_so_before_a_stream_begins(embedded: Serving) -> None:
    for more in ({}, {"stream": True}):
        answer = embedded.ask("word " * 5000, **more)
        assert answer.status_code == 400
        error = shape(answer)
        assert error["code"] == "context_length_exceeded"
        assert "the context holds 1024" in error["message"]
    answer = embedded.post(PLAIN, {"prompt": [5] * 1024})
    assert shape(answer)["code"] == "context_length_exceeded"
    answer = embedded.post(PLAIN, {"prompt": [5, 4096]})
    assert answer.status_code == 400
    assert "not one of the model's 4096" in shape(answer)["message"]


def test_tools_that_the_template_would_drop_are_refused(embedded: Serving) -> None:
    answer = embedded.ask("hi", tools=[TOOL])
    assert answer.status_code == 400
    assert shape(answer)["param"] == "tools"


def test_an_oversized_request_is_refused() -> None:
    with serving(ScriptedEngine(), max_request_bytes=2000) as running:
        assert running.ask("x" * 100).status_code == 200
        answer = running.ask("x" * 3000)
        assert answer.status_code == 413
        assert shape(answer)["code"] == "request_too_large"

        assert running.ask("x" * 8_000_000).status_code == 413

        def without_a_length() -> Any:
            for _ in range(50):
                yield b"x" * 100

        assert running.http.post(CHAT, content=without_a_length()).status_code == 413
        with socket.create_connection(("127.0.0.1", running.server.servers[0].sockets[0].getsockname()[1])) as raw:
            raw.settimeout(20)
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n"
            )
            assert b" 413 " in raw.recv(4096)


def test_a_request_that_never_ends_is_given_up() -> None:
    with serving(ScriptedEngine(), request_s=0.2) as running:
        with socket.create_connection(("127.0.0.1", running.server.servers[0].sockets[0].getsockname()[1])) as raw:
            raw.settimeout(20)
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in raw.recv(4096)
        assert running.ask("still there").status_code == 200
