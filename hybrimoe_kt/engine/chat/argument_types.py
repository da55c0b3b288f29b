"""Arguments that a notation writes as plain text, as what the tool's JSON schema says they are."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["allowed_kinds", "resolved", "typed_arguments"]


def typed_arguments(name: str, texts: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the arguments of a call of tool `name`; a text stays one where the schema does not say otherwise.

    `tools` are functions in OpenAI's notation. A text that is nothing of what the schema allows stays as it is.
    """
    root = _parameters(name, tools)
    properties = resolved(root, root).get("properties")
    schemas = properties if isinstance(properties, Mapping) else {}
    return {key: _typed(text, schemas.get(key), root) for key, text in texts.items()}


def _parameters(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a schema that refers to a definition of `root` says; nothing for what is no schema."""
    for _ in range(8):
        if not isinstance(schema, Mapping):
            return {}
        found = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(schema.get("$ref", "")))
        if found is None:
            return schema
        definitions = root.get(found[1])
        schema = definitions.get(found[2]) if isinstance(definitions, Mapping) else None
    return {}


def _typed(text: str, schema: Any, root: Mapping[str, Any]) -> Any:
    kinds = list(allowed_kinds(schema, root))
    value = _value(text)
    if any(_is(value, kind) for kind in kinds if kind != "string"):
        return value
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return text


def allowed_kinds(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Every type that a schema allows; `root` has the definitions that it may refer to."""
    schema = resolved(schema, root)
    declared = schema.get("type")
    yield from [declared] if isinstance(declared, str) else [one for one in declared or () if isinstance(one, str)]
    for union in ("anyOf", "oneOf", "allOf"):
        for choice in (schema.get(union) or ()) if depth < _MOST_DEPTH else ():
            yield from allowed_kinds(choice, root, depth + 1)
    for constant in [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else [])]:
        yield from (kind for kind in _TYPES if _is(constant, kind))


_MOST_DEPTH = 8


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # some templates show values as Python writes them
        try:
            value = read(text.strip())
            json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return value
    return text


_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "object": dict,
    "array": list,
    "string": str,
}


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, ()))
