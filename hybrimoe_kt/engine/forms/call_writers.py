"""Writers of one tool call: rules of llguidance's Lark, by the kind of notation.

Arguments that a notation writes as JSON follow the tool's schema; of those it writes as text do listed values and all
that is not text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrimoe_kt.engine.chat.argument_types import allowed_kinds, resolved
from hybrimoe_kt.engine.constraint import json_rule, quoted
from hybrimoe_kt.errors import ConfigError

__all__ = [
    "CallWriter",
    "CalledTool",
    "Marks",
    "TaggedCall",
    "called_tool",
    "gemma_call",
    "in_json",
    "python_call",
    "with_json",
]


@dataclass(frozen=True, slots=True)
class Marks:
    """Writes marks for one vocabulary: special tokens by their ids, everything else as text."""

    special: Mapping[str, int]
    end_ids: frozenset[int]

    def __call__(self, text: str) -> str:
        """Return `text` as a sequence of Lark's symbols; tokens that end an answer are left out at its end."""
        pieces = self._pieces(text)
        while pieces and self.special.get(pieces[-1]) in self.end_ids:
            pieces.pop()
        return " ".join(f"<[{self.special[one]}]>" if one in self.special else quoted(one) for one in pieces)

    def until(self, name: str, close: str, *, without: Sequence[str] = ()) -> str:
        """Return rules in which `name` derives any text up to and with `close`; none of `without` is in the text."""
        pieces = self._pieces(close)
        barred = "|".join(_in_regex(text) for text in ((close, *without) if pieces[0] in self.special else without))
        free = f" & ~/(?s:.*)({barred})(?s:.*)/" if barred else ""
        upper = name.upper()
        if pieces[0] in self.special:
            return f"{name}: {upper}? {self(close)}\n{upper}: /(?s:.+)/{free}\n"
        # lazy: as little as there is before the mark, of which tokens may hold a part and what follows it
        return f"{name}[lazy]: {upper}\n{upper}: /(?s:.*){_in_regex(close)}/{free}\n"

    def _pieces(self, text: str) -> list[str]:
        if not self.special:
            return [text] if text else []
        longest = sorted(self.special, key=len, reverse=True)
        return [one for one in re.split(f"({'|'.join(map(re.escape, longest))})", text) if one]


def _in_regex(text: str) -> str:
    """Escape what Lark or its regular expressions would take for their own."""
    escaped = "".join("\\" + one if one in r"\/.+*?()|[]{}^$&~#-" else one for one in text)
    return escaped.replace("\n", r"\n")


@dataclass(frozen=True, slots=True)
class CalledTool:
    """One function: its number among the tools, its name, and what it takes."""

    number: int
    name: str
    parameters: Mapping[str, Any]

    @property
    def properties(self) -> Mapping[str, Any]:
        found = resolved(self.parameters, self.parameters).get("properties")
        return found if isinstance(found, Mapping) else {}

    @property
    def required(self) -> Sequence[str]:
        found = resolved(self.parameters, self.parameters).get("required")
        return found if isinstance(found, list) else ()

    def whole(self) -> Mapping[str, Any]:
        """A schema of all arguments together; what is not declared is not written."""
        is_joined = {"$ref", "allOf", "anyOf", "oneOf"} & self.parameters.keys()
        return {"type": "object", **({} if is_joined else {"properties": {}}), **self.parameters}


CallWriter = Callable[[Marks, CalledTool], str]
"""Writes the rules of one call, of which the first is `call_NUMBER`."""


def called_tool(number: int, tool: Mapping[str, Any]) -> CalledTool:
    function = tool.get("function", tool)
    name, parameters = str(function.get("name")), function.get("parameters") or {}
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ConfigError(f"a call of {name!r} cannot be forced: names have letters, digits, '_', '.' and '-'")
    return CalledTool(number, name, parameters if isinstance(parameters, Mapping) else {})


def with_json(before: str, after: str = "") -> CallWriter:
    """Text with NAME and maybe an ID or NUMBER, the arguments as JSON, text."""

    def rules(marks: Marks, tool: CalledTool) -> str:
        arguments = f"arguments_{tool.number}"
        parts = re.split("(ID|NUMBER)", before)
        written = " ".join(_IDS[part] if part in _IDS else marks(part.replace("NAME", tool.name)) for part in parts)
        return f"call_{tool.number}: {written} {arguments} {marks(after)}\n" + json_rule(arguments, tool.whole())

    return rules


_IDS = {"ID": "/[A-Za-z0-9]{8,16}/", "NUMBER": "/[0-9]{1,2}/"}


def in_json(name: str = "name", arguments: str = "arguments", first: str = "") -> CallWriter:
    return with_json(f'{{{first}"{name}": "NAME", "{arguments}": ', "}")


@dataclass(frozen=True, slots=True)
class _Values:
    """What an argument may be: any text, listed texts, and what is written as JSON."""

    is_text: bool = False
    texts: tuple[str, ...] = ()
    others: tuple[Any, ...] = ()

    @classmethod
    def of(cls, schema: Any, root: Mapping[str, Any], depth: int = 0) -> _Values:
        found = resolved(schema, root)
        if (union := found.get("anyOf") or found.get("oneOf")) and isinstance(union, list) and depth < 8:
            inner = [cls.of(one, root, depth + 1) for one in union]
            return cls(
                any(one.is_text for one in inner),
                tuple(text for one in inner for text in one.texts),
                tuple(other for one in inner for other in one.others),
            )
        listed = [found["const"]] if "const" in found else found.get("enum")
        if isinstance(listed, list):
            others = [one for one in listed if not isinstance(one, str) or not one]
            texts = tuple(one for one in listed if isinstance(one, str) and one)
            return cls(False, texts, ({"enum": others},) if others else ())
        kinds = list(allowed_kinds(found, root))
        if not kinds:  # anything: a text is one
            return cls(True)
        others = [kind for kind in kinds if kind != "string"]
        rest = ({**found, "type": others},) if others and "string" in kinds else (schema,) if others else ()
        return cls("string" in kinds, (), rest)

    def schema(self, tool: CalledTool) -> Any:
        """A schema of what is written as JSON, with the definitions that it may refer to."""
        shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        return {**shared, **(self.others[0] if len(self.others) == 1 else {"anyOf": list(self.others)})}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedCall:
    """Arguments one by one between marks with KEY and, where the notation says what a value is, IS_TEXT."""

    before: str
    after: str
    open: str
    close: str
    never: tuple[str, ...]
    """What no text may hold, for it would end more than the text."""

    def __call__(self, marks: Marks, tool: CalledTool) -> str:
        written, rules = [], ""
        for number, (key, schema) in enumerate(tool.properties.items()):
            rule = f"argument_{tool.number}_{number}"
            written.append(f'({rule} "\\n"?)' + ("" if key in tool.required else "?"))
            rules += self._argument(rule, _key(key), _Values.of(schema, tool.parameters), marks, tool)
        before = marks(self.before.replace("NAME", tool.name))
        return f"call_{tool.number}: {before} {' '.join(written)} {marks(self.after)}\n{rules}"

    def _argument(self, rule: str, key: str, values: _Values, marks: Marks, tool: CalledTool) -> str:
        def opened(is_text: bool) -> str:
            return marks(self.open.replace("KEY", key).replace("IS_TEXT", json.dumps(is_text)))

        ways, rules, close = [], "", marks(self.close)
        if values.is_text:
            ways.append(f"{opened(True)} {rule}_text")
            rules += marks.until(f"{rule}_text", self.close.strip("\n"), without=self.never)
        elif values.texts:
            ways.append(f"{opened(True)} ({' | '.join(map(quoted, values.texts))}) {close}")
        if values.others and ("IS_TEXT" in self.open or not values.is_text):
            ways.append(f"{opened(False)} {rule}_json {close}")
            rules += json_rule(f"{rule}_json", values.schema(tool))
        return f"{rule}: {' | '.join(ways)}\n{rules}"


def _key(key: str) -> str:
    if not re.fullmatch(r"[^\s<>\"'=:,{}\[\]()\\]+", key):
        raise ConfigError(f"a call with a parameter {key!r} cannot be forced in this model's notation of calls")
    return key


def gemma_call(marks: Marks, tool: CalledTool) -> str:
    """`call:NAME{key:value}`, texts between quotes that are a token, all else as JSON."""

    def value(rule: str, schema: Any) -> str:
        values = _Values.of(schema, tool.parameters)
        ways, rules, quote = [], "", marks('<|"|>')
        if values.is_text:
            ways.append(f"{quote} {rule}_text")
            rules += marks.until(f"{rule}_text", '<|"|>', without=("<tool_call|>",))
        elif values.texts:
            ways.append(f"{quote} ({' | '.join(map(quoted, values.texts))}) {quote}")
        if values.others:
            ways.append(f"{rule}_json")
            rules += json_rule(f"{rule}_json", values.schema(tool))
        return f"{rule}: {' | '.join(ways)}\n{rules}"

    return _listed_call(marks, tool, "call:NAME{", ":", "}", value)


def python_call(marks: Marks, tool: CalledTool) -> str:
    """`NAME(key=value)` with JSON's literals, which such calls may have; all in JSON where a name needs it."""
    if not all(name.isidentifier() for name in (*tool.name.split("."), *tool.properties)):
        return in_json()(marks, tool)
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return _listed_call(marks, tool, "NAME(", "=", ")", lambda rule, one: json_rule(rule, {**shared, **_mapping(one)}))


def _mapping(schema: Any) -> Mapping[str, Any]:
    return schema if isinstance(schema, Mapping) else {}


def _listed_call(
    marks: Marks, tool: CalledTool, open_: str, between: str, close: str, value: Callable[[str, Any], str]
) -> str:
    """Arguments with commas; `value` writes the rules of one's value."""
    items, rules, inside = [], "", f"arguments_{tool.number}"
    for number, (key, schema) in enumerate(tool.properties.items()):
        rule = f"argument_{tool.number}_{number}"
        items.append((f"{quoted(_key(key) + between)} {rule}", key in tool.required))
        rules += value(rule, schema)
    before, after = marks(open_.replace("NAME", tool.name)), marks(close)
    return f"call_{tool.number}: {before} {inside} {after}\n{_in_order(inside, items)}{rules}"


def _in_order(name: str, items: Sequence[tuple[str, bool]]) -> str:
    """Rules in which `name` derives the items in order with commas between; those not required may be left out."""

    def after(number: int) -> str:
        return f" {name}_{number + 1}" if number + 1 < len(items) else ""

    num_firsts = next((number + 1 for number, (_, is_required) in enumerate(items) if is_required), 0)
    firsts = [f"{item}{after(number)}" for number, (item, _) in enumerate(items[: num_firsts or None])]
    rules = f"{name}: {' | '.join(firsts if num_firsts else [*firsts, _NOTHING])}\n"
    for number, (item, is_required) in enumerate(items[1:], 1):
        rules += f"{name}_{number}: ({_COMMA} {item}){'' if is_required else '?'}{after(number)}\n"
    return rules


_NOTHING = '""'
_COMMA = '"," " "?'
