"""JSON schemas whose objects have the properties they name and no others, where a schema leaves that open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["closed_schema"]

_JOINING = {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas"}
_OPENING = {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", *_JOINING}
_NAMED = ("properties", "$defs", "definitions")
_LISTED = ("anyOf", "oneOf", "prefixItems")


def closed_schema(schema: Any) -> Any:
    """Return a schema that allows some of what `schema` does: JSON's own default lets a model go on adding properties.

    Returned as it is where several schemas hold for one object: what one of them names would bar what others do.
    """
    is_joined = any("allOf" in one or ("properties" in one and _JOINING & one.keys()) for one in _schemas(schema))
    return schema if is_joined else _closed(schema)


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all within it, but for those that `allOf` joins."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            for inner in value.values():
                yield from _schemas(inner)
        elif key in _LISTED and isinstance(value, list):
            for inner in value:
                yield from _schemas(inner)
        elif key in ("items", "additionalProperties"):
            yield from _schemas(value)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            closed[key] = {name: _closed(inner) for name, inner in value.items()}
        elif key in _LISTED and isinstance(value, list):
            closed[key] = [_closed(inner) for inner in value]
        elif key in ("items", "additionalProperties"):
            closed[key] = _closed(value)
    named, required = schema.get("properties"), schema.get("required")
    if isinstance(named, Mapping) and not _OPENING & schema.keys():
        is_all_named = not isinstance(required, list) or all(name in named for name in map(str, required))
        closed |= {"additionalProperties": False} if is_all_named else {}
    return closed
