"""Answers held to a form: JSON by a schema, grammars, tool calls that are forced, and several answers to one prompt."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Annotated, Any, Literal

import jsonschema_rs
import ollama
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.errors import ConfigError
from tests.support.notations import ROWS, TOOLS, Row

from .drawn import DrawingEngine
from .serving import Serving, serving

ASKED = [{"role": "user", "content": "Weather?"}]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]},
    {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}}, "required": ["age"],
     "additionalProperties": False},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    {"enum": ["yes", "no", 3, None, True]},
    {"const": {"a": [1, 2, "x"]}},
    {"type": "boolean"},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {"type": "object", "properties": {"at": {"type": "string", "format": "date"}}, "required": ["at"],
     "additionalProperties": False},
    {"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}}, "required": ["id"],
     "additionalProperties": False},
    {"$defs": {"leaf": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}}, "type": "object",
     "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
     "required": ["left", "right"], "additionalProperties": False},
    {"$defs": {"tree": {"type": "object", "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9},
     "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "required": ["v", "next"],
     "additionalProperties": False}}, "$ref": "#/$defs/tree"},
    {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string", "maxLength": 3},
     "maxItems": 2}, "ok": {"type": "boolean"}}, "required": ["tags", "ok"], "additionalProperties": False},
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 2}, {"type": "integer", "maximum": 9,
     "minimum": 0}], "items": False, "minItems": 2, "maxItems": 2},
    {"oneOf": [{"type": "object", "properties": {"cat": {"const": 1}}, "required": ["cat"],
     "additionalProperties": False}, {"type": "object", "properties": {"dog": {"const": 2}}, "required": ["dog"],
     "additionalProperties": False}]},
    {"type": "string", "minLength": 1, "maxLength": 6},
    {"type": ["integer", "null"], "minimum": 10, "maximum": 12},
    {"type": "object", "properties": {}, "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "properties": {"deep": {"type": "object", "properties": {"er": {"type": "object",
     "properties": {"est": {"enum": [1.5, "x"]}}, "required": ["est"], "additionalProperties": False}},
     "required": ["er"], "additionalProperties": False}}, "required": ["deep"], "additionalProperties": False},
]  # fmt: skip


def drawn(engine: Engine, schema: dict[str, Any], seed: int) -> str:
    """An answer of the embedded model, as it draws when nearly everything is as likely."""
    sampling = Sampling(
        max_new_tokens=400, temperature=1.5, top_p=1.0, seed=seed, constraint=Constraint.json_schema(schema)
    )
    answer = engine.complete("Tell me in JSON:", sampling=sampling)
    assert answer.reason == "stop" or answer.run["new_tokens"] == 400
    return answer.text if answer.reason == "stop" else ""


def check(engine: Engine, count: int) -> int:
    """Sample answers, of which none may be invalid; return how many ended before they were cut."""
    whole = 0
    for number in range(count):
        schema = SCHEMAS[number % len(SCHEMAS)]
        text = drawn(engine, schema, number)
        if text:
            whole += 1
            value = json.loads(text)
            assert jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value), (schema, text)
    return whole


def test_no_sampled_answer_is_invalid(engine: Engine) -> None:
    assert check(engine, 40) >= 30


@pytest.mark.slow
def test_none_of_five_hundred_sampled_answers_is_invalid(engine: Engine) -> None:
    whole = check(engine, 500)
    print(f"{whole} of 500 answers ended by themselves; all of them are valid")
    assert whole >= 400


class Person(BaseModel):
    """What an answer is to tell of someone."""

    name: Annotated[str, Field(max_length=10)]
    age: Annotated[int, Field(ge=0, le=120)]
    likes: Annotated[list[Literal["tea", "bread"]], Field(max_length=2)]


def test_openais_client_parses_what_comes(embedded: Serving) -> None:
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="none") as client:
        short = {"max_tokens": 600, "seed": 3, "temperature": 0.3}
        asked: Any = [{"role": "user", "content": "Who are you?"}]
        answer = client.chat.completions.parse(model="small-talk", messages=asked, response_format=Person, **short)
        assert isinstance(answer.choices[0].message.parsed, Person)
        plain = client.chat.completions.create(
            model="small-talk", messages=asked, response_format={"type": "json_object"}, **short
        )
        if plain.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(plain.choices[0].message.content or ""), dict)
        stream = client.chat.completions.create(
            model="small-talk", messages=asked, stream=True, max_tokens=40,
            extra_body={"guided_choice": ["one way", "another"]},
        )  # fmt: skip
        said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert said in ("one way", "another")


def test_ollamas_client_gets_its_format(embedded: Serving) -> None:
    client = ollama.Client(host=embedded.url)
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"],
              "additionalProperties": False}  # fmt: skip
    asked = [{"role": "user", "content": "Is it so?"}]
    answer = client.chat(model="small-talk", messages=asked, format=schema, options={"num_predict": 60})
    assert set(json.loads(answer.message.content or "")) == {"yes"}
    said = client.generate(model="small-talk", prompt="A word", format="json", options={"num_predict": 200, "seed": 1})
    if said.done_reason == "stop":
        json.loads(said.response)


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-z]"}, r"[0-9]{3}-[a-z]"),
        ({"grammar": 'root ::= ("ab" | "cd") "!"'}, r"(ab|cd)!"),
        ({"guided_grammar": 'start: "x" /[0-9]/ "y"'}, r"x[0-9]y"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, r"left|right"),
        ({"json_schema": {"enum": ["a", "b"]}}, r'"[ab]"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 7}}}}, "7"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_forms_under_every_name(embedded: Serving, path: str, body: dict[str, Any], pattern: str) -> None:
    asked: dict[str, Any] = {"messages": ASKED} if "chat" in path else {"prompt": "Say"}
    answer = embedded.post(path, {**asked, **body, "max_tokens": 30, "temperature": 1.5, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert re.fullmatch(pattern, text), text
    assert choice["finish_reason"] == "stop", "also where no token that ends an answer may be drawn"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}, "nonsense"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "not 'xml'"),
        ({"guided_regex": "(unclosed"}, "unclosed group"),
        ({"guided_grammar": "start: nowhere"}, "nowhere"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "one form can be asked for at once"),
        ({"guided_choice": []}, None),
        ({"guided_json": {"not": {}}}, "not"),
        ({"guided_json": json.loads('{"items": ' * 70 + "{}" + "}" * 70)}, "nested"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_computed(
    embedded: Serving, body: dict[str, Any], said: str | None
) -> None:
    before = embedded.service.engine.counters().statistics
    answer = embedded.ask("Hi", max_tokens=3, **body)
    if said is None:  # an empty one is none
        assert answer.status_code == 200
        return
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert embedded.service.engine.counters().statistics == before


def test_several_answers_to_one_prompt(embedded: Serving) -> None:
    body = {"messages": ASKED, "n": 4, "max_tokens": 6, "temperature": 1.2, "seed": 5}
    whole = embedded.post("/v1/chat/completions", body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    single = [embedded.post("/v1/chat/completions", body | {"n": 1, "seed": 5 + at}).json() for at in range(4)]
    assert texts == [each["choices"][0]["message"]["content"] for each in single]
    usage = whole["usage"]
    assert usage["prompt_tokens"] == single[0]["usage"]["prompt_tokens"], "counted once"
    assert usage["completion_tokens"] == sum(each["usage"]["completion_tokens"] for each in single)
    with openai.OpenAI(base_url=f"{embedded.url}/v1", api_key="none") as client:
        said = [""] * 4
        for chunk in client.chat.completions.create(model="small-talk", stream=True, **body):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
    assert said == texts
    refused = embedded.post("/v1/completions", {"prompt": "a", "best_of": 3, "max_tokens": 1})
    assert refused.status_code == 400 and "best_of" in refused.json()["error"]["message"]
    assert embedded.post("/v1/completions", {"prompt": "a", "n": 17, "max_tokens": 1}).status_code == 400


# Tool calls that are forced.


def engine_of(row: Row, seed: int, **how: Any) -> DrawingEngine:
    special = ("<|im_end|>", *row.special)
    return DrawingEngine(seed=seed, chat_template=row.template, model_type=row.model_type, special=special, **how)


PICKY = [
    {
        "type": "function",
        "function": {
            "name": "pick",
            "parameters": {
                "type": "object",
                "properties": {
                    "colour": {"enum": ["red", "green"]},
                    "count": {"type": "integer", "minimum": 0, "maximum": 99},
                    "exact": {"type": "boolean"},
                },
                "required": ["colour", "count", "exact"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "rest", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_forced_call_is_one_in_every_notation(row: Row) -> None:
    """Drawn at random: whatever comes is a call of a tool that there is, with arguments of its schema."""
    schema = PICKY[0]["function"]["parameters"]  # type: ignore[index]
    for seed in range(3):
        answer = engine_of(row, seed).answered(ASKED, None, PICKY, ("pick",), one_call=True)
        (call,) = answer.tool_calls
        assert call.name == "pick"
        assert jsonschema_rs.validator_for(schema).is_valid(dict(call.arguments)), call
        assert answer.reason == "tool_calls" and not answer.text.strip()


def test_any_of_the_tools_may_be_called_and_more_than_once() -> None:
    names = set()
    for seed in range(6):
        answer = engine_of(ROWS["hermes (Qwen3)"], seed).answered(ASKED, None, PICKY, ("pick", "rest"))
        assert answer.tool_calls
        names |= {call.name for call in answer.tool_calls}
    assert names == {"pick", "rest"}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_thoughts_are_free_and_what_follows_them_is_held(row: Row) -> None:
    for seed in range(2):
        answer = engine_of(row, seed).answered(ASKED, Constraint.json_schema({"enum": ["left", "right"]}))
        assert json.loads(answer.text) in ("left", "right"), answer.text


def test_openais_client_forces_a_call() -> None:
    row = ROWS["hermes (Qwen3)"]
    with (
        serving(engine_of(row, 4), temperature=1.0) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none") as client,
    ):
        tools: Any = PICKY
        for choice in ("required", {"type": "function", "function": {"name": "pick"}}):
            answer = client.chat.completions.create(
                model="scripted",
                messages=ASKED,
                tools=tools,
                tool_choice=choice,
                max_tokens=3000,  # type: ignore[arg-type]
            )
            assert answer.choices[0].finish_reason == "tool_calls"
            for call in answer.choices[0].message.tool_calls or []:
                assert call.type == "function" and call.function.name in ("pick", "rest")
                json.loads(call.function.arguments)
        with pytest.raises(openai.BadRequestError, match="none of the tools"):
            client.chat.completions.create(
                    model="scripted", messages=ASKED, tools=tools,
                    tool_choice={"type": "function", "function": {"name": "fly"}},
                )  # fmt: skip


def test_a_call_cannot_be_forced_where_no_notation_is_known(embedded: Serving) -> None:
    answer = embedded.ask("Hi", tools=TOOLS, tool_choice="required")
    assert answer.status_code == 400
    assert "no tool calls that are known" in answer.json()["error"]["message"]


# Masks.


def test_an_answer_can_always_be_completed(engine: Engine) -> None:
    """No mask leads into a text that nothing can be added to: whatever is drawn first, the likeliest rest is valid."""
    vocabulary, draw = engine.vocabulary, random.Random(2)
    for number, schema in enumerate(SCHEMAS[:12]):
        matcher = vocabulary.matchers(Constraint.json_schema(schema))
        tokens: list[int] = []
        for at in range(300):
            if matcher.is_over:
                break
            masked = matcher.masked(torch.zeros(vocabulary.size))
            allowed = torch.isfinite(masked).nonzero()[:, 0].tolist()
            assert allowed, (schema, tokens)
            ends = [token for token in allowed if token in engine.end_ids]
            if ends and at > 20:
                break
            short = [token for token in allowed if vocabulary.text_of(token)[:1] in '"}]'] if at > 20 else []
            token = draw.choice(short or [one for one in allowed if one not in engine.end_ids] or ends)
            if token in engine.end_ids:
                break
            matcher.accept(token)
            tokens.append(token)
        else:
            continue  # still writing a long text, and never stuck
        text = vocabulary.text_of_all(tokens)
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(text)), (number, text)


def test_masks_cost_little(engine: Engine) -> None:
    """Of the embedded model's vocabulary; figures of one of 150,000 tokens are in the docs."""
    matcher = engine.vocabulary.matchers(Constraint.json_schema(SCHEMAS[0]))
    scores = torch.zeros(engine.vocabulary.size)
    before = time.perf_counter()
    for _ in range(100):
        matcher.masked(scores)
    assert (time.perf_counter() - before) / 100 < 0.05


def test_without_the_library_one_sentence_says_what_to_install(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install"):
        engine.complete("a", sampling=Sampling(constraint=Constraint.regex("b")))
