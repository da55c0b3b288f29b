"""Values as clients really write them have the meaning that OpenAI's, Ollama's and llama.cpp's servers give them."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe_kt.engine.sampling import Sampling

from .scripted import ScriptedEngine
from .serving import Serving, serving
from .test_openai import WEATHER
from .test_refusals import shape

HI = [{"role": "user", "content": "hi"}]
LONG = 4096
"""Tokens of the scripted engine's context."""
CHAT, PLAIN, OLLAMA = "/v1/chat/completions", "/v1/completions", "/api/chat"

# What a request has besides its prompt -> what the sampling is to have.
OPENAI: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole numbers as floats": (
        {"max_tokens": 10.0, "seed": 1.0, "n": 1.0, "top_k": 40.0}, {"max_new_tokens": 10, "seed": 1, "top_k": 40},
    ),
    "no limit": ({"max_tokens": -1}, {"max_new_tokens": LONG}),
    "the context filled": ({"max_tokens": -2}, {"max_new_tokens": LONG}),
    "nothing to answer": ({"max_tokens": 0}, {"max_new_tokens": 0}),
    "llama.cpp's length": ({"n_predict": 7.0}, {"max_new_tokens": 7}),
    "top_p of nothing": ({"top_p": 0}, {"top_p": 0}),
    "top_k off": ({"top_k": 0}, {"top_k": 0}),
    "top_k off, negative": ({"top_k": -1}, {"top_k": 0}),
    "all off": (
        {"min_p": 0, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "temperature": 0,
         "logit_bias": {}}, {"min_p": 0, "frequency_penalty": 0, "repetition_penalty": 1, "temperature": 0},
    ),
    "hot": ({"temperature": 2}, {"temperature": 2}),
    "biases in pairs": ({"logit_bias": [[5, 1.5], [6.0, False]]}, {"logit_bias": {5: 1.5, 6: -100.0}}),
    "biases by name": ({"logit_bias": {"5": 1}}, {"logit_bias": {5: 1.0}}),
    "vLLM's penalty": ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2, "penalty_window": None}),
    "llama.cpp's penalty": ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2, "penalty_window": 64}),
    "of all tokens": ({"repeat_penalty": 1.2, "repeat_last_n": -1}, {"penalty_window": LONG}),
    "no end": ({"ignore_eos": True}, {"ignore_end": True}),
    "without effect": (
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x",
         "prompt_cache_key": "k", "stream_options": {"include_usage": None}, "cache_prompt": False, "id_slot": 0,
         "n_keep": 5, "dry_base": 1.75, "mirostat_tau": 5.0, "xtc_threshold": 0.1, "timings_per_token": True},
        {},
    ),
    "as done anyway": (
        {"n": 1, "mirostat": 0, "typical_p": 1.0, "tfs_z": 1, "dry_multiplier": 0.0, "xtc_probability": 0,
         "top_n_sigma": -1, "grammar": "", "min_keep": 0, "samplers": [], "response_format": {"type": "text"},
         "modalities": ["text"], "reasoning_format": "auto", "t_max_predict_ms": -1},
        {},
    ),
}  # fmt: skip

# Every field that any of these servers' requests has, as null: left out.
NULLS = (
    "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n_predict", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "repeat_penalty", "repeat_last_n", "frequency_penalty", "presence_penalty",
    "logit_bias", "seed", "stop", "n", "user", "logprobs", "top_logprobs", "tools", "tool_choice", "echo", "suffix",
    "parallel_tool_calls", "response_format", "chat_template_kwargs", "audio", "functions", "function_call", "best_of",
    "modalities", "web_search_options", "metadata", "store", "service_tier", "reasoning_effort", "prediction",
    "verbosity", "ignore_eos", "grammar", "json_schema", "mirostat", "samplers", "lora", "skip_special_tokens",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripted() -> ScriptedEngine:
    return ScriptedEngine(lambda prompt: "a b c d e f g h i j k l m n o")


@pytest.fixture(scope="module")
def asked(scripted: ScriptedEngine) -> Any:
    with serving(scripted) as running:
        yield running


def bodies(more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {CHAT: {"messages": HI, **more}, PLAIN: {"prompt": "hi", **more}}


@pytest.mark.parametrize("case", OPENAI)
def test_what_reaches_the_sampling(asked: Serving, scripted: ScriptedEngine, case: str) -> None:
    given, wanted = OPENAI[case]
    for path, body in bodies(given).items():
        answer = asked.post(path, body)
        assert answer.status_code == 200, answer.text
        assert {name: getattr(scripted.samplings[-1], name) for name in wanted} == wanted


def test_null_is_left_out(asked: Serving, scripted: ScriptedEngine) -> None:
    for path, body in bodies(dict.fromkeys(NULLS)).items():
        answer = asked.post(path, body)
        assert answer.status_code == 200, answer.text
        assert scripted.samplings[-1] == Sampling(max_new_tokens=LONG, temperature=0.0)
    nulls = dict.fromkeys(("stream", "options", "format", "think", "keep_alive", "tools", "logprobs", "truncate"))
    options = dict.fromkeys(("num_predict", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "num_ctx"))
    for body in (nulls, nulls | {"options": options}):
        answer = asked.post(OLLAMA, {"model": "scripted", "messages": HI, **body})
        assert answer.text.splitlines()[-1].startswith('{"model":"scripted"'), answer.text
    more = dict.fromkeys(("system", "suffix", "template", "context", "images", "raw", "width"))
    assert asked.post("/api/generate", {"model": "scripted", "prompt": "hi", **nulls, **more}).status_code == 200
    assert asked.post("/api/generate", {"model": "scripted", "prompt": None}).json()["done_reason"] == "load"
    assert asked.post(OLLAMA, {"model": "scripted", "messages": None}).json()["done_reason"] == "load"


@pytest.mark.parametrize("stop", ["", [""], [], ["", "e"], None])
def test_an_empty_stop_string_is_none(asked: Serving, stop: Any) -> None:
    wanted = "a b c d " if stop == ["", "e"] else "a b c d e f g h i j k l m n o"
    for path, body in bodies({"stop": stop}).items():
        choice = asked.post(path, body).json()["choices"][0]
        assert choice.get("text", choice.get("message", {}).get("content")) == wanted
    answer = asked.post(OLLAMA, {"model": "scripted", "messages": HI, "stream": False, "options": {"stop": stop}})
    assert answer.json()["message"]["content"] == wanted


def test_no_tokens_are_an_empty_answer(asked: Serving) -> None:
    for path, body in bodies({"max_tokens": 0}).items():
        answer = asked.post(path, body).json()
        choice = answer["choices"][0]
        assert choice.get("text", choice.get("message", {}).get("content")) == ""
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"num_predict": 6.0, "seed": 3.0, "top_k": 40.0}, {"max_new_tokens": 6, "seed": 3, "top_k": 40}),
        ({"num_predict": -1}, {"max_new_tokens": LONG}),
        ({"num_predict": -2}, {"max_new_tokens": LONG}),
        ({"num_predict": 0}, {"max_new_tokens": LONG}),  # no limit, in Ollama's runner
        ({"top_p": 0.0, "top_k": -1}, {"top_p": 0.0, "top_k": 0}),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1, "penalty_window": 64}),
        ({"repeat_last_n": 33}, {"penalty_window": 33}),
        ({"repeat_last_n": 0}, {"penalty_window": 0}),
        ({"repeat_last_n": -1}, {"penalty_window": LONG}),
        ({"num_ctx": 2048, "num_gpu": 1, "num_thread": 8, "use_mmap": True, "numa": False, "num_keep": 5}, {}),
        ({"typical_p": 1.0, "mirostat": 0, "mirostat_tau": 0.8, "tfs_z": 1.0, "penalize_newline": True}, {}),
    ],
)
def test_ollamas_options(
    asked: Serving, scripted: ScriptedEngine, given: dict[str, Any], wanted: dict[str, Any]
) -> None:
    answer = asked.post(OLLAMA, {"model": "scripted", "messages": HI, "options": given})
    assert answer.status_code == 200, answer.text
    assert {name: getattr(scripted.samplings[-1], name) for name in wanted} == wanted


def test_a_seed_below_zero_draws_others_each_time(embedded: Serving) -> None:
    def openai(seed: int) -> str:
        return str(embedded.ask("Hello!", max_tokens=8, temperature=1.5, seed=seed).json()["choices"][0]["message"])

    def ollama(seed: int) -> str:
        options = {"seed": seed, "temperature": 1.5, "num_predict": 8}
        body = {"model": "small-talk", "messages": HI, "options": options, "stream": False}
        return str(embedded.post(OLLAMA, body).json()["message"])

    for say in (openai, ollama):
        assert say(4) == say(4)
        assert len({say(-1) for _ in range(4)}) > 1


def test_content_may_be_missing_beside_tool_calls() -> None:
    engine = ScriptedEngine()
    function: dict[str, Any] = {"name": "weather", "arguments": {"place": "Bern"}}
    with serving(engine) as running:
        for content in ({}, {"content": None}, {"content": ""}, {"content": []}):
            call = {"id": "1", "type": "function", "function": function | {"arguments": '{"place": "Bern"}'}}
            called = {"role": "assistant", **content, "tool_calls": [call]}
            result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
            answer = running.post(CHAT, {"messages": [*HI, called, result], "tools": [WEATHER]})
            assert answer.json()["choices"][0]["message"]["content"] == "echo: sunny", answer.text
        for content in ({}, {"content": None}, {"content": ""}):
            for arguments in (function, {"name": "now"}, {"name": "now", "arguments": None}):
                called = {"role": "assistant", **content, "tool_calls": [{"function": arguments}]}
                messages = [*HI, called, {"role": "tool", "tool_name": "weather", "content": "sunny"}]
                answer = running.post(OLLAMA, {"model": "scripted", "messages": messages, "stream": False})
                assert answer.json()["message"]["content"] == "echo: sunny", answer.text
        assert '<tool_call>{"name": "now", "arguments": {}}</tool_call>' in engine.prompts[-1]


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_thoughts_are_turned_on_and_off_by_the_variable_that_the_template_has(name: str) -> None:
    knows = "{% for m in messages %}{{ m.content }}{% endfor %} {{ " + name + " is defined and " + name + " }}"
    engine = ScriptedEngine(lambda prompt: "ok", chat_template=knows)
    with serving(engine) as running:
        for asked in ({"enable_thinking": True}, {"thinking": True}, {"thinking": {"type": "enabled"}}):
            assert running.ask("hi", **asked).status_code == 200
            assert engine.prompts[-1] == "hi True"
        for asked in ({"enable_thinking": False}, {"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}):
            assert running.ask("hi", **asked).status_code == 200
            assert engine.prompts[-1] == "hi False"
        assert running.ask("hi", reasoning_effort="medium").status_code == 200
        assert engine.prompts[-1] == f"hi {name == 'thinking'}"
        body = {"model": "scripted", "messages": HI, "stream": False}
        assert running.post(OLLAMA, body | {"think": True}).status_code == 200
        assert engine.prompts[-1].endswith(" True")
    with serving(ScriptedEngine(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")) as running:
        assert shape(running.ask("hi", **{name: True}))["param"] == name


def test_ollamas_think_is_an_effort_where_the_template_has_efforts() -> None:
    knows = "{% for m in messages %}{{ m.content }}{% endfor %} effort: {{ reasoning_effort or 'medium' }}"
    engine = ScriptedEngine(lambda prompt: "ok", chat_template=knows)
    with serving(engine) as running:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "stream": False}
        for think, shown in (("high", "high"), ("low", "low"), (True, "medium"), (False, "medium")):
            assert running.post(OLLAMA, body | {"think": think}).status_code == 200
            assert engine.prompts[-1] == f"hi effort: {shown}"


def test_effort_is_what_the_template_knows_of_it() -> None:
    knows = "{% for m in messages %}{{ m.content }}{% endfor %} effort: {{ reasoning_effort }}"
    engine = ScriptedEngine(lambda prompt: "ok", chat_template=knows)
    with serving(engine) as running:
        assert running.ask("hi", reasoning_effort="high").status_code == 200
        assert engine.prompts[-1] == "hi effort: high"
    engine = ScriptedEngine(lambda prompt: "ok")
    with serving(engine) as running:
        assert running.ask("hi", reasoning_effort="medium").status_code == 200
        assert "</think>" not in engine.prompts[-1]
        assert running.ask("hi", reasoning_effort="none").status_code == 200
        assert "</think>" in engine.prompts[-1]
        assert shape(running.ask("hi", reasoning_effort="high"))["param"] == "reasoning_effort"
