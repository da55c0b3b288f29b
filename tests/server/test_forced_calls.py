"""Forced calls, and content of a form after thoughts, in every notation: drawn by a model that knows nothing."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
import pytest
import torch

from hybrimoe_kt.engine.chat.argument_types import typed_arguments
from hybrimoe_kt.engine.chat.call_notations import CALLS
from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.engine.forms.call_forms import FORMS
from hybrimoe_kt.errors import ConfigError
from tests.support.notations import CONTENT, ROWS, Row

from .drawn import DrawingEngine
from .serving import serving
from .test_notations import written

pytest.importorskip("llguidance")

HI = [{"role": "user", "content": "hi"}]
PLACE = {
    "type": "object",
    "properties": {"lat": {"type": "integer"}, "name": {"type": "string", "maxLength": 6}},
    "required": ["lat", "name"],
    "additionalProperties": False,
}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "place": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 40},
        "unit": {"enum": ["C", "F"]},
        "tag": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "at": {"$ref": "#/$defs/place"},
        "mode": {"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["place", "days", "at"],
    "$defs": {"place": PLACE},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "news"}},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x"]}}, "required": ["a"]}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def drawing(row: Row, seed: int = 0) -> DrawingEngine:
    special = ("<|im_end|>", *row.special)
    return DrawingEngine(
        seed=seed, chat_template=row.template, model_type=row.model_type, special=special, context_tokens=20_000
    )


def check_forced(row: Row, seed: int) -> bool:
    """Of all tools but `news`: calls and nothing but calls, by their schemas. Whether it came to its end."""
    engine = drawing(row, seed)
    answer = engine.answered(HI, None, TOOLS, ["weather", "time"])
    shown = engine.tokenizer.decode(engine.drawn)
    if answer.reason == "length":  # a text or thought that went on
        return False
    assert (answer.reason, answer.text.strip()) == ("tool_calls", ""), shown
    for call in answer.tool_calls:
        assert call.name in ("weather", "time")
        jsonschema_rs.validate(PARAMETERS if call.name == "weather" else {"maxProperties": 0}, dict(call.arguments))
    return True


@each_row
def test_forced_calls_are_calls(row: Row) -> None:
    check_forced(row, 1)


@pytest.mark.slow
@each_row
def test_many_forced_calls(row: Row) -> None:
    assert sum(check_forced(row, seed) for seed in range(2, 32)) >= 10


@each_row
def test_one_named_call(row: Row) -> None:
    engine = drawing(row)
    answer = engine.answered(HI, None, TOOLS, ["time"], one_call=True)
    assert [(call.name, dict(call.arguments)) for call in answer.tool_calls] == [("time", {})]
    assert (answer.reason, answer.text.strip()) == ("tool_calls", "")


@each_row
def test_what_the_family_writes_before_a_name_may_be_drawn(row: Row) -> None:
    """Its thoughts, and its own marks of calls."""
    engine = drawing(row)
    vocabulary = engine.vocabulary
    held = vocabulary.held(vocabulary.chat_ids(HI, TOOLS), None, TOOLS, ["weather"])
    assert held is not None
    matcher = vocabulary.matchers(held)
    text = written(row).replace(CONTENT, "", 1)
    ids = engine.tokenizer(re.split(r"\bweather\b", text)[0])["input_ids"]
    drawn = 0
    for token in ids:
        if matcher.masked(torch.zeros(len(engine.tokenizer)))[token] != 0:
            break
        matcher.accept(token)
        drawn += 1
    # ids of Solar's calls are those of another row, and Llama 4's calls in Python are held to its JSON
    assert engine.tokenizer.decode(ids[drawn:]) in ("", "functions.", "<|python_start|>[")


@each_row
def test_thoughts_come_before_a_form(row: Row) -> None:
    engine = drawing(row, seed=5)
    answer = engine.answered(HI, Constraint.json_schema(SCHEMA))
    if answer.reason == "length":
        assert answer.text == "" and answer.thoughts
        return
    assert answer.reason == "stop"
    jsonschema_rs.validate(SCHEMA, json.loads(answer.text))
    assert bool(answer.thoughts) or not row.begun


@pytest.mark.parametrize("name", ["gpt-oss", "hermes (Qwen3)", "Gemma 4", "Solar Open", "GLM-4.5"])
def test_an_answer_with_thoughts_may_have_any_form(name: str) -> None:
    for form, wanted in (
        (Constraint.choice(["yes", "no"]), ("yes", "no")),
        (Constraint.regex("a{3}b?"), ("aaa", "aaab")),
        (Constraint.grammar('root ::= "x" ("y" | "z")'), ("xy", "xz")),
        (Constraint.grammar('start: "x" ("y" | "z")'), ("xy", "xz")),
    ):
        answer = drawing(ROWS[name]).answered(HI, form)
        assert answer.text in wanted, (form, answer)


def test_beside_tools_an_answer_has_the_form_or_is_a_call() -> None:
    kinds = set()
    for seed in range(30):
        answer = drawing(ROWS["hermes (Qwen3)"], seed).answered(HI, Constraint.json_schema(SCHEMA), TOOLS)
        if answer.reason != "length":
            kinds.add(answer.reason)
            if answer.reason == "stop":
                jsonschema_rs.validate(SCHEMA, json.loads(answer.text))
        if len(kinds) == 2:
            break
    assert kinds == {"stop", "tool_calls"}


def test_where_the_template_has_closed_the_thoughts_the_form_begins_at_once() -> None:
    engine = DrawingEngine()
    for seed in range(5):
        engine.seed = seed
        answer = engine.answered(HI, Constraint.choice(["word"]), options={"enable_thinking": False})
        assert engine.tokenizer.decode(engine.drawn) == answer.text == "word"


def test_every_notation_has_a_form() -> None:
    assert {name for name in CALLS if name not in FORMS} == {"lfm2-list"}  # LFM2's own, under another mark


def test_names_that_no_notation_holds_are_refused() -> None:
    engine = drawing(ROWS["Qwen3-Coder"])
    prompt = engine.vocabulary.chat_ids(HI, TOOLS)
    odd = [{"type": "function", "function": {"name": "a>b"}}]
    with pytest.raises(ConfigError, match="names have letters"):
        engine.vocabulary.held(prompt, None, odd, ["a>b"])
    odd = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a>b": {}}}}}]
    with pytest.raises(ConfigError, match="parameter 'a>b'"):
        engine.vocabulary.held(prompt, None, odd, ["f"])


def test_a_described_notation_is_refused() -> None:
    engine = drawing(ROWS["hermes (Qwen3)"])
    engine.tokenizer.response_template = {"fields": {"tool_calls": {}}}
    with pytest.raises(ConfigError, match="its own description"):
        engine.vocabulary.held([1], None, TOOLS, ["time"])


def test_arguments_follow_references_to_definitions() -> None:
    given = {"at": '{"lat": 1, "name": "x"}', "unit": "C", "place": "3"}
    assert typed_arguments("weather", given, TOOLS) == {"at": {"lat": 1, "name": "x"}, "unit": "C", "place": "3"}


def test_the_server_forces_calls() -> None:
    row = ROWS["hermes (Qwen3)"]
    named = {"type": "function", "function": {"name": "time"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    with serving(drawing(row, 3), temperature=1.0) as running:
        for choice in (named, allowed):
            answer = running.ask("hi", tools=TOOLS, tool_choice=choice, max_tokens=4000).json()["choices"][0]
            assert answer["finish_reason"] == "tool_calls", answer
            assert {call["function"]["name"] for call in answer["message"]["tool_calls"]} == {"time"}
        auto = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
        assert running.ask("hi", tools=TOOLS, tool_choice=auto, max_tokens=5).status_code == 200
        bad = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}]
        refused = running.ask("hi", tools=bad, tool_choice="required")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tool_choice" and "not" in refused.json()["error"]["message"]
