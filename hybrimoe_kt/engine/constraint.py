"""The form an answer must have, as plain data, and as the grammar that the llguidance library reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, Literal

from hybrimoe_kt.errors import ConfigError

from .forms.closed_schema import closed_schema

__all__ = ["Constraint", "json_rule", "quoted"]

_MOST_BYTES = 2**17
_MOST_DEPTH = 60  # half of what llguidance's JSON reader takes within a grammar
_MOST_REMAINDERS = 50_000  # of all multipleOf of a schema together; 10,007 take 0.15 s, and that grows in proportion
# One space, or a line's end and the indentation of the next: a model that may write any would write them for ever.
_WHITESPACE = r" |\r?\n[ \t]{0,32}"
# Tokens are never forced: llguidance would cut forced text into tokens by its own means.
_HEAD = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer's text is held to; make one by the class methods.

    They raise ConfigError for what is no constraint at all. Whether a schema or grammar can be followed is only known
    once it is compiled, see `TokenMatchers`.
    """

    kind: Literal["JSON schema", "regex", "choice", "grammar", "whole"]
    """`whole` is llguidance's own list of grammars, which names tokens of one model by id."""
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Constraint:
        """JSON that satisfies `schema`, given as its text too; properties come in the schema's order."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise ConfigError("the JSON schema is not JSON") from None
        if not isinstance(schema, Mapping | bool):
            raise ConfigError("a JSON schema is an object")
        return cls("JSON schema", _checked_schema(schema))

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text that `pattern` matches from beginning to end, in the syntax of Rust's regex crate."""
        return cls("regex", _short_enough("regex", pattern))

    @classmethod
    def choice(cls, options: Sequence[str]) -> Constraint:
        """One of `options`, word for word."""
        if not options or not all(isinstance(option, str) and option for option in options):
            raise ConfigError("a choice is between texts, at least one, none of them empty")
        return cls("choice", _short_enough("choice", json.dumps(list(options))))

    @classmethod
    def grammar(cls, text: str) -> Constraint:
        """A text of a context-free grammar: llguidance's Lark with a rule `start`, or llama.cpp's GBNF with `root`."""
        return cls("grammar", _short_enough("grammar", text))

    def rules(self, name: str) -> str:
        """Return Lark rules in which `name` derives the text; not of a `grammar`, which has names of its own."""
        if self.kind == "JSON schema":
            return json_rule(name, json.loads(self.text))
        if self.kind == "choice":
            return f"{name}: {' | '.join(quoted(option) for option in json.loads(self.text))}\n"
        assert self.kind == "regex", self.kind
        return f"{name}: {name.upper()}\n{name.upper()}: /{_in_slashes(self.text)}/\n"

    def definition(self) -> str:
        """Return the grammar as llguidance reads it; ConfigError for GBNF that cannot be converted."""
        if self.kind == "whole":
            return self.text
        lark = self.lark() if self.kind == "grammar" else self.rules("start")
        return json.dumps({"grammars": [{"lark_grammar": _HEAD + lark}]})

    def lark(self) -> str:
        """Return a `grammar` in Lark's notation; ConfigError for GBNF that cannot be converted."""
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            return str(any_to_lark(self.text))
        except Exception as error:  # its errors have no class in common
            raise ConfigError(f"the grammar is not taken: {error}") from None

    @classmethod
    def within(cls, rules: str, inner: Constraint | None) -> Constraint:
        """Return the constraint of Lark `rules` with a rule `start`; `@form` in them is the grammar `inner`."""
        grammars = [{"lark_grammar": _HEAD + rules}]
        if inner is not None:
            grammars.append({"name": "form", "lark_grammar": inner.lark()})
        return cls("whole", json.dumps({"grammars": grammars}))


def json_rule(name: str, schema: Any) -> str:
    """Return the Lark rule `name` that derives JSON by `schema`, with bounded white space and no unnamed properties."""
    shown = {**closed_schema(schema)} if isinstance(schema, Mapping) else ({} if schema else {"not": {}})
    shown["x-guidance"] = {"whitespace_pattern": _WHITESPACE}
    return f"{name}: %json {json.dumps(shown)}\n"


def quoted(text: str) -> str:
    """Return `text` as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _in_slashes(pattern: str) -> str:
    from llguidance import regex_to_lark

    return str(regex_to_lark(pattern))


def _short_enough(what: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"a {what} is a text that is not empty")
    if len(text.encode(errors="replace")) > _MOST_BYTES:
        raise ConfigError(f"the {what} is longer than {_MOST_BYTES} bytes")
    return text


def _checked_schema(schema: Mapping[str, Any] | bool) -> str:
    remainders = 1
    for depth, key, value in _values(schema):
        if depth > _MOST_DEPTH:
            raise ConfigError(f"the JSON schema is nested more than {_MOST_DEPTH} levels deep")
        if key == "multipleOf" and isinstance(value, int | float) and value > 0:
            remainders = prod((remainders, _numerator(value)))
    if remainders > _MOST_REMAINDERS:
        raise ConfigError(f"multipleOf counts to {remainders} in this JSON schema, the limit is {_MOST_REMAINDERS}")
    return _short_enough("JSON schema", json.dumps(schema))


def _numerator(value: float) -> int:
    """A multiple of the value without its decimals."""
    try:
        return abs(Fraction(str(value)).numerator)
    except ValueError:  # infinite
        return _MOST_REMAINDERS + 1


def _values(value: Any) -> Iterator[tuple[int, str, Any]]:
    """Every value within a JSON value with its depth and key; ones that lie far too deep are left out."""
    waiting: list[tuple[int, str, Any]] = [(0, "", value)]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        waiting += [(depth + 1, str(name), one) for name, one in inner]
