"""Earlier messages in the form that a chat template reads: thoughts, tool calls and their results.

Templates differ in what they call thoughts, and in whether arguments are an object or its JSON; some show calls only
where there is no content. None of them says so, hence each form is tried with a made-up call and looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from .call_notations import CallNotation
from .thought_notations import thoughts_of

__all__ = ["Render", "with_calls", "with_thoughts", "with_tools"]

Render = Callable[[list[dict[str, Any]]], str]
"""Writes a conversation as the chat template does; raises what the template raises."""

_MARK = "hybrimoe mark"
_OTHER_NAMES = ("thinking", "reasoning", "thoughts", "tool_plan")
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
    alone = "<|channel|>" in template  # gpt-oss's takes thoughts or content beside calls, not both
    return [_renamed(message, name, splits=is_other, alone=alone) for message in messages]


def _renamed(message: Mapping[str, Any], name: str, *, splits: bool, alone: bool) -> dict[str, Any]:
    turn = dict(message)
    if turn.get("role") != "assistant":
        return turn
    content = turn.get("content")
    if splits and isinstance(content, str) and (match := _TEXTUAL.match(content)):
        turn.setdefault("reasoning_content", match[1])
        turn["content"] = content[match.end() :]
    if name not in ("", "reasoning_content") and "reasoning_content" in turn:
        turn[name] = turn.pop("reasoning_content")
    if alone and turn.get("tool_calls") and turn.get(name):
        turn["content"] = ""
    return turn


def with_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], how: str
) -> list[dict[str, Any]]:
    """Return the messages with `tools`, and `how` to call them, told in the system message."""
    functions = [tool.get("function", tool) for tool in tools]
    told = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    text = f"You have these tools, a JSON object each:\n{told}\n\n{how}"
    first, rest = (messages[0], messages[1:]) if messages and messages[0].get("role") == "system" else ({}, messages)
    content = first.get("content") or ""
    if isinstance(content, list):
        said: Any = [*content, {"type": "text", "text": text}]
    else:
        said = f"{content}\n\n{text}" if content else text
    return [{"role": "system", **first, "content": said}, *map(dict, rest)]


def with_calls(
    messages: Sequence[Mapping[str, Any]], notation: CallNotation | None, template: str, render: Render
) -> list[dict[str, Any]]:
    """Return the messages with calls as `render` shows them, ids as `notation` wants them, results with names.

    Calls that the template leaves out are written into the content.
    """
    if not any(message.get("tool_calls") for message in messages):
        return [dict(message) for message in messages]
    calls = _Calls(notation)
    turns = [calls.known(message) for message in messages]
    form = next((form for form in _FORMS if _are_shown(1, form, notation, render)), _in_content(notation))
    if form in _FORMS and not _are_shown(2, form, notation, render):
        turns = _one_by_one(turns)
    if "tool_responses" in template and not re.search(r"""==\s*['"]tool['"]""", template):
        turns = _with_responses(turns)
    return [form(turn) if turn.get("tool_calls") else turn for turn in turns]


def _one_by_one(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each call in a turn of its own, its result behind it; thoughts and content stay with the first."""
    parted: list[dict[str, Any]] = []
    while turns:
        turn, results = turns[0], list(takewhile(_is_result, turns[1:]))
        turns = turns[1 + len(results) :]
        first = turn
        for call in turn.get("tool_calls") or ():
            own = [result for result in results if result.get("tool_call_id") == call["id"]]
            parted += [{**first, "tool_calls": [call]}, *own]
            results = [result for result in results if result not in own]
            first = {"role": turn["role"], "content": ""}
        parted += results if turn.get("tool_calls") else [turn, *results]
    return parted


def _with_responses(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results within the turn of their calls, as Gemma's template reads them."""
    joined: list[dict[str, Any]] = []
    for turn in turns:
        if _is_result(turn) and joined and joined[-1].get("tool_calls"):
            response = {"name": turn.get("name", ""), "response": turn.get("content")}
            joined[-1] = {**joined[-1], "tool_responses": [*joined[-1].get("tool_responses", ()), response]}
        else:
            joined.append(turn)
    return joined


def _is_result(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") == "tool"


class _Calls:
    """The calls of a conversation so far, under ids that its chat template takes."""

    def __init__(self, notation: CallNotation | None) -> None:
        self._notation = notation
        self._names: list[str] = []
        self._ids: dict[str, str] = {}  # given -> shown
        self._waiting: dict[str, str] = {}  # shown id -> function, of calls without a result

    def known(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with such ids; one after the other."""
        if message.get("tool_calls"):
            return {**message, "tool_calls": [self._named(call) for call in message["tool_calls"]]}
        return {**message, **(self._answered(message) if _is_result(message) else {})}

    def _named(self, call: Mapping[str, Any]) -> dict[str, Any]:
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

    def _answered(self, result: Mapping[str, Any]) -> dict[str, Any]:
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


def _in_content(notation: CallNotation | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Calls as the model wrote them, where that is known; else as they are."""

    def form(turn: dict[str, Any]) -> dict[str, Any]:
        functions = [call["function"] for call in turn["tool_calls"]]
        calls = [(str(one["name"]), json.loads(_json(one.get("arguments")))) for one in functions]
        written = notation.write(calls) if notation is not None else ""
        if not written or not isinstance(turn.get("content") or "", str):
            return turn
        rest = {name: value for name, value in turn.items() if name != "tool_calls"}
        return {**rest, "content": (turn.get("content") or "") + written}

    return form


_FORMS = (_objects, _texts, _without_content(_objects), _without_content(_texts))


def _are_shown(
    num_calls: int,
    form: Callable[[dict[str, Any]], dict[str, Any]],
    notation: CallNotation | None,
    render: Render,
) -> bool:
    """Whether calls come out with their arguments, neither as Python writes an object nor as JSON within JSON."""
    ids = [(notation.make_id("hybrimoe", at) if notation else "") or f"call_{at}" for at in range(num_calls)]
    marks = [f"{_MARK} {at}" for at in range(num_calls)]
    calls = [
        {"id": one, "type": "function", "function": {"name": "hybrimoe", "arguments": {"key": mark, "other": [1]}}}
        for one, mark in zip(ids, marks, strict=True)
    ]
    asked = {"role": "user", "content": "hello"}
    called = form({"role": "assistant", "content": "", "tool_calls": calls})
    answered = [{"role": "tool", "content": "ok", "tool_call_id": one, "name": "hybrimoe"} for one in ids]
    try:
        text = render([asked, called, *answered])
    except Exception:
        return False
    return all(mark in text for mark in marks) and "'key':" not in text and r"\"key\"" not in text
