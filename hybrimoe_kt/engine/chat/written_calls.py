"""Tool calls as models write them, read into names and arguments: JSON, tags, Python, Gemma's own.

A reader takes all that stands between a notation's marks and returns every call of it; ValueError where anything in
there is not a call.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Reader", "WrittenCall", "first_of", "gemma_calls", "json_calls", "python_calls", "tagged"]


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """One call; of arguments that `are_texts` the tool's schema tells what they mean."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    """What the model calls it, empty where the notation has nothing of the kind."""
    are_texts: bool = False


Reader = Callable[[str], list[WrittenCall]]


def first_of(*readers: Reader) -> Reader:
    """Read what the first of `readers` that can makes of it."""

    def read(body: str) -> list[WrittenCall]:
        for reader in readers[:-1]:
            try:
                return reader(body)
            except ValueError:
                continue
        return readers[-1](body)

    return read


def json_calls(body: str) -> list[WrittenCall]:
    """Objects with a name and arguments (Hermes), one after the other or in a list; `function` may hold both."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while rest := body[at:].lstrip(" \t\r\n;"):
        value, length = decoder.raw_decode(rest)
        found += value if isinstance(value, list) else [value]
        at = len(body) - len(rest) + length
    return _some([_of_json(value) for value in found])


def _of_json(value: Any) -> WrittenCall:
    if not isinstance(value, Mapping):
        raise ValueError("a tool call is an object")
    function = value["function"] if isinstance(value.get("function"), Mapping) else value
    name = function.get("name", function.get("tool_name"))
    arguments = function.get("arguments", function.get("parameters"))
    given = value.get("id", value.get("tool_call_id"))
    return WrittenCall(_name(name), _object(arguments), "" if given is None else str(given))


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError("a tool call needs a name")
    return name


def _object(arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        arguments = json.loads(arguments) if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise ValueError("a tool call's arguments are an object")
    return dict(arguments or {})


def _some(calls: list[WrittenCall]) -> list[WrittenCall]:
    if not calls:
        raise ValueError("there is no tool call between the marks")
    return calls


def tagged(call: str, argument: str | None = None) -> Reader:
    """Read calls that match `call` from beginning to end, with nothing but white space between them.

    Its groups: `name`, `id` where there is one, and either `json` or `arguments`, which are matches of `argument` with
    its groups `key`, `value` and maybe `is_text` ("false" where the value is JSON).
    """
    whole = re.compile(call, re.DOTALL)
    one = re.compile(argument, re.DOTALL) if argument is not None else None

    def read(body: str) -> list[WrittenCall]:
        return _some([_of_tags(match, one) for match in _matches(whole, body)])

    return read


def _matches(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(text) and not text[at:].isspace():
        match = pattern.match(text, at + len(text[at:]) - len(text[at:].lstrip()))
        if match is None or match.end() == at:
            raise ValueError(f"{text[at : at + 40]!r} is not of the notation")
        yield match
        at = match.end()


def _of_tags(match: re.Match[str], argument: re.Pattern[str] | None) -> WrittenCall:
    groups = match.groupdict()
    name, number = _name((groups["name"] or "").strip()), groups.get("id") or ""
    if argument is None:
        written_json = (groups["json"] or "").strip()
        if not written_json:
            raise ValueError("a call without arguments, which are written even where there are none, was cut off")
        return WrittenCall(name, _object(written_json), number)
    written = [one.groupdict() for one in _matches(argument, groups["arguments"] or "")]
    values = {
        one["key"]: json.loads(one["value"]) if one.get("is_text") == "false" else one["value"] for one in written
    }
    return WrittenCall(name, values, number, are_texts="is_text" not in argument.groupindex)


def python_calls(body: str) -> list[WrittenCall]:
    """A list of Python calls with keyword arguments (Llama 4, LFM2); JSON's `true`, `false`, `null` mean the same."""
    try:
        tree = ast.parse(_TEXT.sub(lambda text: text[0].replace("\n", "\\n"), body.strip()), mode="eval").body
        return _some([_of_python(call) for call in (tree.elts if isinstance(tree, ast.List) else [tree])])
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a list of calls: {error}") from None


_TEXT = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
"""A string, which models write over several lines as well."""


def _of_python(call: ast.expr) -> WrittenCall:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("a call has keyword arguments alone")
    return WrittenCall(ast.unparse(call.func), {str(one.arg): _constant(one.value) for one in call.keywords})


def _constant(node: ast.expr) -> Any:
    """A literal that JSON has too."""
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_constant(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _constant(value) for key, value in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"{value!r} is nothing that JSON has")
    return value


_NAMES = {"true": True, "false": False, "null": None}


def _key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError("keys are strings")
    return node.value


_GEMMA_TEXT = r'<\|"\|>(?P<text>.*?)<\|"\|>'
_GEMMA_PART = re.compile(
    rf'{_GEMMA_TEXT}|"(?:\\.|[^"\\])*"|(?<=[{{,])\s*(?P<key>[^\s{{}}\[\],:"<]+)\s*:'
    rf"|\b(?P<python>None|True|False)\b",
    re.DOTALL,
)
_GEMMA_CALL = re.compile(r"\s*call:(?P<name>[^\s{]+)\s*(?P<arguments>\{.*\})\s*", re.DOTALL)


def gemma_calls(body: str) -> list[WrittenCall]:
    """`call:name{key:value}`: JSON whose keys are bare and whose strings stand between `<|"|>`."""
    call = _GEMMA_CALL.fullmatch(body)
    if call is None:
        raise ValueError("a call is call:name{...}")
    return [WrittenCall(call["name"], _object(json.loads(_GEMMA_PART.sub(_as_json, call["arguments"]))))]


def _as_json(part: re.Match[str]) -> str:
    if part["text"] is not None:
        return json.dumps(part["text"])
    if part["python"] is not None:  # as its chat template shows them
        return {"None": "null", "True": "true", "False": "false"}[part["python"]]
    return part[0] if part["key"] is None else f"{json.dumps(part['key'])}:"
