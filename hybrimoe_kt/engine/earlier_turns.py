"""Earlier messages in the form that a chat template reads: thoughts, tool calls and their results.

Templates differ in what they call thoughts, and in whether arguments are an object or its JSON; some show calls only
where there is no content. None of them says so, hence each form is tried with a made-up call and looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .notations import CallNotation, thoughts_of

__all__ = ["Render", "with_calls", "with_thoughts"]

Render = Callable[[list[dict[str, Any]]], str]
"""Writes a conversation as the chat template does; raises what the template raises."""

_MARK = "hybrimoe mark"
_OTHER_NAMES = ("thinking", "reasoning", "thoughts")
_TEXTUAL = re.compile(r"\s*<think>\s*(.*?)\s*(?:</think>\s*|\Z)", re.DOTALL)


def with_thoughts(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return the messages with their `reasoning_content` under the name that `template` reads.

    Where a template has other marks for thoughts than `<think>`, those are thoughts too that stand so in an answer's
    content.
    """
    notation = thoughts_of(template)
    is_other = notation is not None and notation.open != "<think>"
    if "reasoning_content" in template:
        name = "reasoning_content"
    else:
        read = (name for name in _OTHER_NAMES if re.search(rf"""(?:\.|\[\s*['"]|get\(['"]){name}\b""", template))
        name = next(read, "")
    return [_renamed(message, name, splits=is_other) for message in messages]


def _renamed(message: Mapping[str, Any], name: str, *, splits: bool) -> dict[str, Any]:
    turn = dict(message)
    if turn.get("role") != "assistant":
        return turn
    content = turn.get("content")
    if splits and isinstance(content, str) and (match := _TEXTUAL.match(content)):
        turn.setdefault("reasoning_content", match[1])
        turn["content"] = content[match.end() :]
    if name not in ("", "reasoning_content") and "reasoning_content" in turn:
        turn[name] = turn.pop("reasoning_content")
        if turn.get("tool_calls"):
            turn["content"] = ""  # such a template takes thoughts or content beside calls, not both
    return turn


def with_calls(
    messages: Sequence[Mapping[str, Any]], notation: CallNotation | None, render: Render
) -> list[dict[str, Any]]:
    """Return the messages with calls as `render` shows them, ids as `notation` wants them, results with names."""
    if not any(message.get("tool_calls") for message in messages):
        return [dict(message) for message in messages]
    form = next((form for form in _FORMS if _is_shown(form, notation, render)), _FORMS[0])
    calls = _Calls(notation)
    turns = []
    for message in messages:
        turn = dict(message)
        if turn.get("tool_calls"):
            turn = form({**turn, "tool_calls": [calls.named(call) for call in turn["tool_calls"]]})
        elif turn.get("role") == "tool":
            turn |= calls.answered(turn)
        turns.append(turn)
    return turns


class _Calls:
    """The calls of a conversation so far, under ids that its chat template takes."""

    def __init__(self, notation: CallNotation | None) -> None:
        self._notation = notation
        self._names: list[str] = []
        self._ids: dict[str, str] = {}  # given -> shown
        self._waiting: dict[str, str] = {}  # shown id -> function, of calls without a result

    def named(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """The call with such an id."""
        name, given = str(call["function"]["name"]), call.get("id") or ""
        shown = given if self._fits(given) else ""
        if not shown and self._notation is not None:
            shown = self._notation.make_id(name, len(self._names))
        shown = shown or f"call_{len(self._names)}"
        self._ids[given or shown] = shown
        self._names.append(name)
        self._waiting[shown] = name
        return {**call, "id": shown}

    def _fits(self, given: str) -> bool:
        return self._notation is None or re.fullmatch(self._notation.id_pattern or ".*", given) is not None

    def answered(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Which call a result is of: the one it names, by id or function, else the first that has none."""
        of_name = [shown for shown, name in self._waiting.items() if name == result.get("name")]
        first = next(iter([*of_name, *self._waiting]), "")
        shown = self._ids.get(result.get("tool_call_id") or "", first)
        name = self._waiting.pop(shown, "")
        return {"tool_call_id": shown, "name": result.get("name") or name} if name else {}


def _objects(turn: dict[str, Any]) -> dict[str, Any]:
    return turn


def _texts(turn: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"].get("arguments"))}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def _without_content(form: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda turn: {**form(turn), "content": None}


_FORMS = (_objects, _texts, _without_content(_objects), _without_content(_texts))


def _is_shown(form: Callable[[dict[str, Any]], dict[str, Any]], notation: CallNotation | None, render: Render) -> bool:
    """Whether a call comes out with its arguments, neither as Python writes an object nor as JSON within JSON."""
    number = (notation.make_id("hybrimoe", 0) if notation is not None else "") or "call_0"
    call = {
        "id": number,
        "type": "function",
        "function": {"name": "hybrimoe", "arguments": {"key": _MARK, "other": [1]}},
    }
    asked = {"role": "user", "content": "hello"}
    called = form({"role": "assistant", "content": "", "tool_calls": [call]})
    answered = {"role": "tool", "content": "ok", "tool_call_id": number, "name": "hybrimoe"}
    try:
        text = render([asked, called, answered])
    except Exception:
        return False
    return _MARK in text and "'key':" not in text and r"\"key\"" not in text
