"""What an answer's text says beside its content: thoughts and tool calls, in the model family's own notation.

Transformers' parser finds what stands between marks as text comes; this is the only file that asks for it. A tokenizer
may bring Transformers' description of its notation along (`response_template`); else the one of `notations` counts.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrimoe_kt.host.hf.architectures import every_architecture

from .argument_types import typed_arguments
from .events import TextDelta, ToolCall
from .notations import WRAPPINGS, CallNotation, ThoughtNotation, calls_of, thoughts_of

__all__ = ["ResponseFormat", "ResponseParts", "response_format"]

logger = logging.getLogger(__name__)

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_ANSWER = "<answer>"  # the anchor that the parser wants, in front of what the chat template wrote of the answer
_PREFIX_TOKENS = 256  # holds the beginning of the answer that a chat template writes, such as "<think>\n"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The notation of one model's answers."""

    thoughts: ThoughtNotation | None
    calls: CallNotation | None
    wrappings: tuple[tuple[str, str], ...]
    own: Mapping[str, Any] | None
    """Transformers' description, where the tokenizer has one; it then counts instead of all else."""
    shown_tokens: tuple[str, ...] = ()
    """Texts of calls that the chat template has: they are not left out where calls are content."""

    @property
    def has_calls(self) -> bool:
        """Whether it has tool calls."""
        return self.calls is not None if self.own is None else "tool_calls" in self.own["fields"]

    @property
    def writes_think(self) -> bool:
        """Whether thoughts, where there are any, stand between `<think>` and `</think>`."""
        return self.thoughts is None or self.thoughts.open == "<think>"

    def parts(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()
    ) -> ResponseParts | None:
        """Return what splits the answer to `prompt`, None where there is nothing to split off.

        `prompt` are the token ids before the answer: the chat template may have begun it, with `<think>`, say. Without
        `tools` what looks like a call is content.
        """
        prefix = str(tokenizer.decode(list(prompt[-_PREFIX_TOKENS:])))
        if self.own is not None:
            template = _without_calls(self.own) if not tools else self.own
            return ResponseParts(_parser(tokenizer, template, prefix, tools), tools=tools)
        calls = self.calls if tools else None
        marks = self._marks(calls)
        if not marks:
            return None
        opened = self.thoughts.open if self.thoughts and _ends_with(prefix, self.thoughts.open) else ""
        parser = _parser(tokenizer, self._template(calls), _ANSWER + opened, ())
        return ResponseParts(parser, marks, calls, tools)

    def _template(self, calls: CallNotation | None) -> dict[str, Any]:
        """The same in Transformers' words."""
        fields: dict[str, Any] = {}
        if self.thoughts is not None:
            at = "" if self.thoughts.opens_anywhere else r"\A"
            ends = [rf"\s*{re.escape(self.thoughts.close)}\s*"]
            ends += [rf"(?=\s*{calls.open})"] if calls is not None and calls.ends_thoughts else []
            opens = rf"{at}\s*{re.escape(self.thoughts.open.rstrip())}\s*"
            fields["reasoning_content"] = {"open_pattern": opens, "close_pattern": "|".join(ends), "repeats": True}
        if calls is not None:
            fields["tool_calls"] = {"open_pattern": _padded(calls.open), "content_args": {"strip": False}}
            fields["tool_calls"] |= {"close_pattern": _padded(calls.close)} if calls.close else {}
        dropped = "|".join(self._dropped())
        fields["content"] = {"content": "text"} | ({"close_pattern": dropped} if dropped else {})
        return {"start_anchor": _ANSWER, "fields": fields}

    def _dropped(self) -> Iterator[str]:
        if self.thoughts is not None and self.thoughts.dropped:
            yield self.thoughts.dropped
        before = "|".join([r"\A", *([re.escape(self.thoughts.close)] if self.thoughts else [])])
        for begin, end in self.wrappings:
            yield rf"(?<=(?:{before})\s*){re.escape(begin)}\s*|\s*{re.escape(end)}\s*\Z"

    def _marks(self, calls: CallNotation | None) -> set[str]:
        """Texts that may be special tokens and must be seen."""
        marks = {text for pair in self.wrappings for text in pair}
        if self.thoughts is not None:
            marks |= {self.thoughts.open, self.thoughts.close, *self.thoughts.tokens}
        return marks | set(calls.tokens if calls is not None else self.shown_tokens)


def response_format(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> ResponseFormat:
    """Return the notation of a model's answers: what its chat template shows, else what its family is known for."""
    given = tokenizer.chat_template
    template = "\n".join(given.values()) if isinstance(given, dict) else str(given or "")
    model_type = str(model.config.model_type)
    formats = (family.answer_format for family in every_architecture() if family.model_type == model_type)
    calls = calls_of(template, next(filter(None, formats), ""))
    return ResponseFormat(
        thoughts=thoughts_of(template, tokenizer.added_tokens_encoder),
        calls=calls,
        shown_tokens=tuple(text for text in (calls.tokens if calls else ()) if text in template),
        wrappings=tuple(pair for pair in WRAPPINGS if all(mark in template for mark in pair)),
        own=getattr(tokenizer, "response_template", None),
    )


def _padded(pattern: str) -> str:
    """White space around marks is of no meaning."""
    return rf"\s*(?:{pattern})\s*" if not pattern.startswith(r"\A") else pattern


def _without_calls(template: Mapping[str, Any]) -> dict[str, Any]:
    return {**template, "fields": {name: field for name, field in template["fields"].items() if name != "tool_calls"}}


def _ends_with(prompt: str, mark: str) -> bool:
    return prompt.rstrip().endswith(mark.rstrip())


def _parser(
    tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], prefix: str, tools: Sequence[Mapping[str, Any]]
) -> Any:
    return tokenizer.get_response_parser(dict(template), prefix=prefix, tools=[dict(tool) for tool in tools] or None)


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
            calls = self._read_calls(body, self._calls)
        except (ValueError, RecursionError) as error:
            logger.info("a tool call is not in the model's notation: %s", error)
            return [TextDelta(written)]
        return list(calls)

    def _written(self, body: str, calls: CallNotation) -> str:
        """Take what was written of the calls, their marks too, from what is unsaid."""
        opened = re.search(_padded(calls.open), self._unsaid)
        at = self._unsaid.index(body, opened.end() if opened else 0)
        closed = re.compile(_padded(calls.close)).match(self._unsaid, at + len(body)) if calls.close else None
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
