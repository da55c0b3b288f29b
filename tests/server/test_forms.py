"""Answers held to a form: drawn by the embedded model at a high temperature, and through every interface's client."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any, Literal

import jsonschema_rs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.engine.forms.closed_schema import closed_schema
from hybrimoe_kt.engine.forms.token_matcher import TokenMatchers
from hybrimoe_kt.engine.sampler import Sampler
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.text.token_bytes import TokenBytes
from hybrimoe_kt.errors import ConfigError

from .drawn import DrawingEngine
from .scripted import byte_tokenizer
from .serving import Serving, serving

pytest.importorskip("llguidance")

HI = [{"role": "user", "content": "Good morning."}]
_NODE = {"type": "object", "properties": {"value": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/node"},
         {"type": "null"}]}}, "required": ["value", "next"], "additionalProperties": False}  # fmt: skip


_TREE = TokenMatchers(len(byte_tokenizer()), TokenBytes(byte_tokenizer()), [byte_tokenizer().eos_token_id])


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "a text": _object(a={"type": "string"}),
    "a short text": _object(a={"type": "string", "minLength": 2, "maxLength": 5}),
    "a pattern": _object(a={"type": "string", "pattern": "^[a-z]{2}-[0-9]{1,4}$"}),
    "whole numbers": _object(a={"type": "integer"}, b={"type": "integer", "minimum": -3, "maximum": 12}),
    "numbers": _object(a={"type": "number", "minimum": 0.5, "exclusiveMaximum": 7}),
    "multiples": _object(a={"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700}),
    "constants": _object(a={"const": "x"}, b={"enum": ["one", 2, None, False, {"c": [1]}]}),
    "null and truth": _object(a={"type": "null"}, b={"type": "boolean"}, c={"type": ["boolean", "null"]}),
    "a list": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "a tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "string"}], "items": False,
                "minItems": 2},
    "nested": _object(a=_object(b=_object(c={"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3}))),
    "some optional": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "integer"}, "c": {}},
                      "required": ["b"], "additionalProperties": False},
    "a reference": {"$ref": "#/$defs/node", "$defs": {"node": _NODE}},
    "one of several": _object(a={"anyOf": [{"type": "integer"}, {"type": "boolean"}, _object(b={"type": "null"})]}),
    "of kinds": _object(a={"oneOf": [_object(kind={"const": "p"}, x={"type": "integer"}),
                                     _object(kind={"const": "q"}, y={"type": "boolean"})]}),
    "all of": {"allOf": [{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]},
                         {"type": "object", "properties": {"b": {"enum": [1, 2]}}, "required": ["b"]}]},
    "dates": _object(a={"type": "string", "format": "date"}, b={"type": "string", "format": "uuid"}),
    "a map": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "any object": {"type": "object"},
    "a bare text": {"type": "string", "maxLength": 12},
}  # fmt: skip


def check_drawn(engine: Engine, name: str, seed: int) -> bool:
    """Draw an answer; return whether it came to its end. One that did is of the schema."""
    constraint = Constraint.json_schema(SCHEMAS[name])
    sampling = Sampling(temperature=1.5, top_p=1.0, seed=seed, max_new_tokens=60, constraint=constraint)
    answer = engine.chat("Tell me a story.", sampling=sampling)
    if answer.reason == "length":
        assert answer.run["new_tokens"] == 60
        return False
    assert answer.reason == "stop"
    jsonschema_rs.validate(SCHEMAS[name], json.loads(answer.text))
    return True


def test_drawn_answers_are_of_their_schema(engine: Engine) -> None:
    """40 of them, of which some go on beyond their length: maps, and numbers, end when the model wants it."""
    assert sum(check_drawn(engine, name, seed) for name in SCHEMAS for seed in (1, 2)) >= 15


@pytest.mark.slow
def test_500_drawn_answers_are_of_their_schema(engine: Engine) -> None:
    assert sum(check_drawn(engine, name, seed) for name in SCHEMAS for seed in range(100, 125)) >= 200


def test_properties_that_a_schema_does_not_name_are_not_written() -> None:
    tree = {"type": "object", "properties": {"a": {"items": {"properties": {"b": {}}}}}}
    closed = closed_schema(tree)
    assert closed["additionalProperties"] is False
    assert closed["properties"]["a"]["items"]["additionalProperties"] is False
    for open_ in (
        SCHEMAS["all of"],
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {}, "$ref": "#/$defs/x"},
        {"properties": {"a": {}}, "additionalProperties": True},
        {"enum": [{"properties": {}}]},
    ):
        assert closed_schema(open_) == open_


def test_an_answer_ends_where_nothing_can_be_added(engine: Engine) -> None:
    choice = Sampling(constraint=Constraint.choice(["yes", "no"]), max_new_tokens=40, temperature=0)
    for sampling in (choice, Sampling(constraint=choice.constraint, ignore_end=True, num_logprobs=2)):
        answer = engine.chat("Is it so?", sampling=sampling)
        assert answer.text in ("yes", "no") and answer.reason == "stop"
        assert answer.run["new_tokens"] <= 3
        if sampling.num_logprobs:  # the model's own, of tokens that the form forbids too
            assert all(one.likeliest and one.logprob is not None and one.logprob < 0 for one in answer.sampled)
    short = Sampling(constraint=Constraint.json_schema(SCHEMAS["dates"]), max_new_tokens=5)
    assert engine.complete("A date: ", sampling=short).reason == "length"


def test_forms_of_other_kinds(engine: Engine) -> None:
    for constraint, pattern in (
        (Constraint.regex(r"[a-z]{3}/\d{2}"), r"[a-z]{3}/[0-9]{2}"),
        (Constraint.grammar('root ::= "(" item ("," item)* ")"\nitem ::= [0-9]+'), r"\(\d+(,\d+)*\)"),
        (Constraint.grammar('start: "a" B\nB: /[0-9]{1,3}/'), r"a\d{1,3}"),
        (
            Constraint.choice(["two words", 'a "quoted" \\ one', "\u5929\u6c14"]),
            r'two words|a "quoted" \\ one|\u5929\u6c14',
        ),
    ):
        for seed in range(2):
            answer = engine.complete("Once", sampling=Sampling(constraint=constraint, seed=seed, max_new_tokens=60))
            assert answer.reason == "length" or re.fullmatch(pattern, answer.text), answer.text


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "string", "format": "password"}, "Unknown format: password"),
        ({"$ref": "http://x/y"}, "does not fetch"),
        ({"pattern": "^(?=a)b", "type": "string"}, "look-around"),
        ({"not": {}}, '"not"'),
        (False, "not"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum (2)"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "nothing satisfies it"),
        ({"type": "integer", "multipleOf": 100_000_007}, "multipleOf counts to 100000007"),
        ({"allOf": [{"multipleOf": 1009}, {"multipleOf": 1013}]}, "multipleOf counts to 1022117"),
        ({"enum": ["x" * 2**17]}, "longer than 131072 bytes"),
        (json.loads('{"items":' * 70 + "{}" + "}" * 70), "more than 60 levels deep"),
        ([], "a JSON schema is an object"),
        ("{", "is not JSON"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_with_the_reason(schema: Any, reason: str) -> None:
    tokenizer = byte_tokenizer()
    matchers = TokenMatchers(len(tokenizer), TokenBytes(tokenizer), [tokenizer.eos_token_id])
    with pytest.raises(ConfigError, match=re.escape(reason)):
        matchers(Constraint.json_schema(schema))


@pytest.mark.parametrize(
    ("make", "given"),
    [
        *((Constraint.regex, text) for text in ("(", "", "a" * 2**18, 5)),
        *((Constraint.grammar, text) for text in ("(", "start: nothing", "", 'root ::= nothing "a"')),
        *((Constraint.choice, listed) for listed in ([], ["a", 1], [""], 5)),
    ],
)
def test_other_forms_that_cannot_be_followed_are_refused(make: Any, given: Any) -> None:
    with pytest.raises((ConfigError, TypeError)):
        _TREE(make(given))


def test_without_the_library_a_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    tokenizer = byte_tokenizer()
    matchers = TokenMatchers(len(tokenizer), TokenBytes(tokenizer), [tokenizer.eos_token_id])
    for constraint in (Constraint.json_object(), Constraint.grammar("root ::= x"), Constraint.regex("a")):
        with pytest.raises(ConfigError, match="pip install 'llguidance"):
            matchers(constraint)


def test_a_model_may_have_more_tokens_than_its_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    size, end = len(tokenizer) + 50, tokenizer.eos_token_id
    matcher = TokenMatchers(size, TokenBytes(tokenizer), [end])(Constraint.regex("[ab]"))
    for num_logits in (size, size + 100, len(tokenizer)):
        allowed = matcher.masked(torch.zeros(num_logits)).isfinite().nonzero().flatten().tolist()
        assert sorted(tokenizer.decode([token]) for token in allowed) == ["a", "b"]
    sample = Sampler(Sampling(temperature=0), matcher=matcher, forbidden=[end])
    assert tokenizer.decode([sample(torch.zeros(size)).token]) in "ab" and sample.is_over
    assert sample(torch.zeros(size)).token == end


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(name=st.sampled_from(sorted(set(SCHEMAS) - {"a reference", "any object"})), choices=st.data())
def test_whatever_is_drawn_can_be_completed(name: str, choices: st.DataObject) -> None:
    """Some allowed tokens at random, then those that end things as soon as may be."""
    tokenizer = byte_tokenizer()
    matcher = _TREE(Constraint.json_schema(SCHEMAS[name]))
    written: list[int] = []
    num_free = choices.draw(st.integers(0, 12))
    liked = torch.zeros(len(tokenizer))
    for rank, character in enumerate('"}],5:0123467891-ntfax{['):
        liked[tokenizer(character)["input_ids"][0]] = 100 - rank
    for step in range(400):
        if matcher.is_over:
            break
        scores = matcher.masked(liked)
        if step < num_free:
            token = choices.draw(st.sampled_from(scores.isfinite().nonzero().flatten().tolist()))
        else:
            token = tokenizer.eos_token_id if scores[tokenizer.eos_token_id].isfinite() else int(scores.argmax())
        if token == tokenizer.eos_token_id:
            break
        matcher.accept(token)
        written.append(token)
    text = tokenizer.decode(written)
    jsonschema_rs.validate(SCHEMAS[name], json.loads(text))


class Cat(BaseModel):
    name: Literal["Tom", "Minka"]
    age: Annotated[int, Field(ge=0, le=30)]


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 5}}}}, "5"),
        ({"response_format": {"type": "json_object", "schema": {"const": 5}}}, "5"),
        ({"response_format": {"type": "json_object"}, "json_schema": {"const": 5}}, "5"),
        ({"json_schema": {"const": 5}}, "5"),
        ({"guided_json": '{"const": 5}'}, "5"),
        ({"guided_regex": "a[bc]d"}, "a[bc]d"),
        ({"guided_choice": ["x y", "z"]}, "x y|z"),
        ({"guided_grammar": 'root ::= "q" "r"'}, "qr"),
        ({"grammar": 'root ::= "q" | "r"'}, "[qr]"),
        ({"structured_outputs": {"choice": ["x y", "z"]}}, "x y|z"),
        ({"structured_outputs": {"json": {"const": 5}, "regex": None}}, "5"),
    ],
)
def test_each_field_holds_chats_and_completions(embedded: Serving, fields: dict[str, Any], pattern: str) -> None:
    chat = embedded.ask("Hello!", **fields).json()["choices"][0]
    assert re.fullmatch(pattern, chat["message"]["content"]) and chat["finish_reason"] == "stop"
    completion = embedded.post("/v1/completions", {"prompt": "Hello", **fields}).json()["choices"][0]
    assert re.fullmatch(pattern, completion["text"])


def test_openais_client_parses_into_models(embedded: Serving) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{embedded.url}/v1", api_key="none")
    answer = client.chat.completions.parse(model="small-talk", messages=HI, response_format=Cat, max_tokens=200)  # type: ignore[arg-type]
    cat = answer.choices[0].message.parsed
    assert cat is not None and cat.name in ("Tom", "Minka")


def test_ollamas_client_takes_a_format(embedded: Serving) -> None:
    from ollama import Client

    client, name = Client(host=embedded.url), embedded.service.model_name
    chat = client.chat(model=name, messages=HI, format=Cat.model_json_schema(), options={"num_predict": 200})
    assert Cat.model_validate_json(chat.message.content or "").age is not None
    for raw in (False, True):
        schema = {"enum": ["x", "y"]}
        assert client.generate(model=name, prompt="Hi", format=schema, raw=raw).response in ('"x"', '"y"')  # type: ignore[arg-type]


def test_several_answers_in_order(embedded: Serving) -> None:
    how = {"temperature": 1.0, "max_tokens": 12}
    alone = [embedded.ask("A story", seed=seed, **how).json() for seed in (7, 8, 9)]
    together = embedded.ask("A story", seed=7, n=3, **how).json()
    texts = [answer["choices"][0]["message"]["content"] for answer in alone]
    assert [choice["message"]["content"] for choice in together["choices"]] == texts and len(set(texts)) > 1
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    usage = together["usage"]
    assert usage["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] == sum(answer["usage"]["completion_tokens"] for answer in alone)
    streamed: dict[int, str] = {}
    roles = []
    for line in embedded.ask("A story", seed=7, n_cmpl=3, stream=True, **how).text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                roles += [choice["index"]] if "role" in choice["delta"] else []
                streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["delta"].get("content", "")
    assert list(streamed.values()) == texts and roles == [0, 1, 2]


def test_several_answers_to_several_prompts(embedded: Serving) -> None:
    body = {"prompt": ["One", "Two"], "n": 2, "best_of": 2, "max_tokens": 3, "echo": True, "seed": 1}
    answer = embedded.post("/v1/completions", body).json()
    assert [choice["text"][:3] for choice in answer["choices"]] == ["One", "One", "Two", "Two"]
    each = [embedded.post("/v1/completions", body | {"prompt": one}).json()["usage"] for one in ("One", "Two")]
    assert answer["usage"]["prompt_tokens"] == sum(one["prompt_tokens"] for one in each)


def test_calls_of_each_answer_are_counted_from_nought() -> None:
    tool = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    with serving(DrawingEngine(), temperature=1.0) as running:
        body = {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "time"}}, "n": 2}
        text = running.ask("hi", stream=True, max_tokens=900, **body).text
    lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    calls = [(line["choices"][0]["index"], call["index"]) for line in lines
             for call in line["choices"][0]["delta"].get("tool_calls", [])]  # fmt: skip
    assert calls == [(0, 0), (1, 0)]
