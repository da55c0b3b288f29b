"""What a request wants its answer to be like, under the names that several servers have for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hybrimoe_kt.engine.constraint import Constraint
from hybrimoe_kt.errors import ConfigError

from .errors import ApiError

__all__ = ["FIELDS", "constraint_of", "format_constraint"]

_KINDS: Mapping[str, Callable[[Any], Constraint]] = {
    "json": Constraint.json_schema,
    "regex": Constraint.regex,
    "choice": Constraint.choice,
    "grammar": Constraint.grammar,
}
_NAMES = {
    "json_schema": "json", "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice",
    "grammar": "grammar", "guided_grammar": "grammar",
}  # fmt: skip
FIELDS = ("response_format", "structured_outputs", *_NAMES)
"""Fields of OpenAI's, llama.cpp's and vLLM's requests that hold an answer to a form."""


def constraint_of(given: Mapping[str, Any]) -> Constraint | None:
    """Return the form that the fields of a request want, None for none; ApiError for what cannot be understood."""
    wanted = {name: value for name in FIELDS if (value := given.get(name))}
    if wanted.get("response_format") == {"type": "text"}:
        del wanted["response_format"]
    if "response_format" in wanted and wanted["response_format"] == {"type": "json_object"}:
        others = [name for name in wanted if name != "response_format"]
        if others:  # llama.cpp's clients say both
            del wanted["response_format"]
    if len(wanted) > 1:
        raise _refused(next(iter(wanted)), f"one form can be asked for at once, not {' and '.join(sorted(wanted))}")
    for name, value in wanted.items():
        return _made(name, value)
    return None


def format_constraint(value: Any) -> Constraint | None:
    """Return the form that Ollama's `format` wants."""
    if not value:
        return None
    if value == "json":
        return Constraint.json_object()
    if not isinstance(value, Mapping):
        raise _refused("format", 'format is "json" or a JSON schema')
    return _said("format", lambda: Constraint.json_schema(value))


def _made(name: str, value: Any) -> Constraint:
    if name == "response_format":
        return _said(name, lambda: _of_response_format(value))
    if name == "structured_outputs":
        return _said(name, lambda: _of_structured_outputs(value))
    return _said(name, lambda: _KINDS[_NAMES[name]](value))


def _of_response_format(value: Any) -> Constraint:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object":
        schema = value.get("schema")
        return Constraint.json_schema(schema) if schema else Constraint.json_object()
    if kind == "json_schema":
        inner = value.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else value.get("schema")
        if schema is None:
            raise ConfigError("response_format of type json_schema needs json_schema.schema")
        return Constraint.json_schema(schema)
    raise ConfigError(f"response_format is of type text, json_object or json_schema, not {kind!r}")


def _of_structured_outputs(value: Any) -> Constraint:
    given = {name: one for name, one in value.items() if one} if isinstance(value, Mapping) else {}
    kinds = [name for name in (*_KINDS, "json_object") if name in given]
    if len(kinds) != 1 or "structural_tag" in given:
        raise ConfigError(f"structured_outputs has one of {', '.join((*_KINDS, 'json_object'))}")
    return Constraint.json_object() if kinds == ["json_object"] else _KINDS[kinds[0]](given[kinds[0]])


def _said(name: str, make: Callable[[], Constraint]) -> Constraint:
    try:
        return make()
    except (ConfigError, TypeError, RecursionError) as error:
        raise _refused(name, str(error)) from None


def _refused(name: str, reason: str) -> ApiError:
    return ApiError(400, reason, param=name, code="invalid_value")
