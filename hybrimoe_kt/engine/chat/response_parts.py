"""What an answer says, told apart as it comes: thoughts, tool calls and content."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hybrimoe_kt.engine.events import TextDelta, ToolCall

from .argument_types import typed_arguments
from .call_notations import CallNotation

__all__ = ["ResponseParts", "padded"]

logger = logging.getLogger(__name__)

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def padded(pattern: str) -> str:
    """Return the pattern of a mark with the white space around it, which is of no meaning."""
    return rf"\s*(?:{pattern})\s*" if not pattern.startswith(r"\A") else pattern


class ResponseParts:
    """Splits one answer as it comes. Text that is not what the notation promises stays content, as it is."""

    def __init__(
        self,
        parser: Any,
        marks: Collection[str] | None = None,
        calls: CallNotation | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """`parser` is Transformers' own, which has read what the chat template wrote of the answer.

        `marks` are the special tokens it must see, by default all; without `calls` it reads calls itself.
        """
        self.marks = True if marks is None else marks
        self._parser, self._calls, self._tools = parser, calls, tools
        self._names = {tool.get("function", tool).get("name") for tool in tools}
        self._pending: list[str] = []  # pieces of a tool call that is still open
        self._unsaid = ""  # what was fed and is not yet in a part or a call
        self._num_calls = 0

    def feed(self, text: str) -> list[TextDelta | ToolCall]:
        """Return what `text` completes."""
        self._unsaid += text
        return self._read(text)

    def flush(self) -> list[TextDelta | ToolCall]:
        """Return what was held back, at the end."""
        return self._read(None)

    def _read(self, text: str | None) -> list[TextDelta | ToolCall]:
        """Feed text, or end the answer; a parser that fails is done with, and all text content from there on."""
        said: list[TextDelta | ToolCall] = []
        if self._parser is not None:
            try:
                events = self._parser.finalize()[1] if text is None else self._parser.feed(text)
                for event in events:
                    said += self._say(event)
                return said
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                logger.info("the answer is not in the model's notation: %s", error)
                self._parser = None
        rest, self._unsaid = self._unsaid, ""
        return [*said, TextDelta(rest)] if rest else said

    def _say(self, event: dict[str, Any]) -> Iterator[TextDelta | ToolCall]:
        field, kind = event.get("field"), event["type"]
        if field == "tool_calls":
            if kind == "region_chunk":
                self._pending.append(event["text"])
            elif kind == "region_close":
                yield from self._said_calls(event["value"])
        elif kind == "region_chunk" and not event.get("dirty"):
            self._forget(event["text"])
            if field == "content" or field in _THOUGHTS:
                yield TextDelta(event["text"], is_thought=field in _THOUGHTS)

    def _forget(self, text: str) -> None:
        """Events hand over what was fed piece by piece, in order, without the marks between."""
        self._unsaid = self._unsaid[self._unsaid.index(text) + len(text) :]

    def _said_calls(self, value: Any) -> list[TextDelta | ToolCall]:
        body = "".join(self._pending)
        if self._calls is None:
            calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
            self._forget(body)
            self._pending.clear()
            return list(calls)
        self._pending.clear()
        written = self._written(body, self._calls)
        try:
            if self._calls.must_close and not re.search(rf"{self._calls.close}\s*\Z", written):
                raise ValueError("it was cut off")
            calls = self._read_calls(body, self._calls)
        except (ValueError, RecursionError) as error:
            logger.info("a tool call is not in the model's notation: %s", error)
            return [TextDelta(written)]
        return list(calls)

    def _written(self, body: str, calls: CallNotation) -> str:
        """Take what was written of the calls, their marks too, from what is unsaid."""
        opened = re.search(padded(calls.open), self._unsaid)
        at = self._unsaid.index(body, opened.end() if opened else 0)
        closed = re.compile(padded(calls.close)).match(self._unsaid, at + len(body)) if calls.close else None
        start, end = opened.start() if opened else at, closed.end() if closed else at + len(body)
        written, self._unsaid = self._unsaid[start:end], self._unsaid[end:]
        return written

    def _read_calls(self, body: str, notation: CallNotation) -> list[ToolCall]:
        calls = []
        for number, call in enumerate(notation.read(body), self._num_calls):
            if notation.known_tools_only and call.name not in self._names:
                raise ValueError(f"{call.name!r} is none of the tools")
            arguments = typed_arguments(call.name, call.arguments, self._tools) if call.are_texts else call.arguments
            json.dumps(arguments, allow_nan=False)
            calls.append(ToolCall(call.name, arguments, call.id or notation.make_id(call.name, number)))
        self._num_calls += len(calls)
        return calls


def _call(value: Any) -> ToolCall:
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call needs a name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError("a tool call's arguments are an object")
    return ToolCall(function["name"], arguments)
