"""What an answer's text says beside its content: thoughts and tool calls, in the model family's own notation.

Transformers knows notations (a tokenizer's `response_template`, or its server's table by model type) and parses them;
this is the only file that asks for them. Thoughts between `<think>` and `</think>` at the beginning of an answer are
split off for any other model whose chat template or vocabulary has these marks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.utils import get_response_template

from .events import TextDelta, ToolCall

__all__ = ["ResponseParts", "response_format", "response_parts"]

logger = logging.getLogger(__name__)

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_OPEN, _CLOSE = "<think>", "</think>"
# Only what an answer begins with; white space around the marks is neither thought nor content.
_THOUGHTS_FIELD = {"open_pattern": rf"\A\s*{_OPEN}\s*", "close_pattern": rf"\s*{_CLOSE}\s*", "content": "text"}
_ANSWER = "<answer>"  # the anchor that the parser wants, in front of what the chat template wrote of the answer
_THOUGHTS_FORMAT: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": _ANSWER,
    "fields": {"reasoning_content": _THOUGHTS_FIELD, "content": {"content": "text"}},
}
_PREFIX_TOKENS = 256  # holds the beginning of the answer that a chat template writes, such as "<think>\n"


def response_format(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, calls: bool
) -> dict[str, Any] | None:
    """Return the template that splits this model's answers, None where Transformers has none that fits.

    Without `calls` tool calls stay in the text. One that has no tool calls does not fit when they are asked for.
    """
    template = get_response_template(tokenizer, model)
    if template is None or (calls and "tool_calls" not in template["fields"]):
        return None
    fields = {name: field for name, field in template["fields"].items() if calls or name != "tool_calls"}
    thoughts = fields.get("reasoning_content", {})
    if (thoughts.get("open"), thoughts.get("close")) == (_OPEN, _CLOSE):
        fields["reasoning_content"] = _THOUGHTS_FIELD
    return {**template, "fields": fields}


def response_parts(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    prompt: Sequence[int],
    tools: Sequence[Mapping[str, Any]] = (),
) -> ResponseParts | None:
    """Return what splits the answer to `prompt`, None where no notation is known.

    `prompt` are the token ids before the answer: the chat template may have begun it, with `<think>`, say.
    """
    prefix = str(tokenizer.decode(list(prompt[-_PREFIX_TOKENS:])))
    template, marks = response_format(tokenizer, model, calls=bool(tools)), None
    if template is None or not _fits(template, prefix):
        if not _has_thoughts(tokenizer):
            return None
        template, marks = _THOUGHTS_FORMAT, (_OPEN, _CLOSE)
        prefix = _ANSWER + (_OPEN if re.search(rf"{_OPEN}\s*\Z", prefix) else "")
    parser = tokenizer.get_response_parser(
        dict(template), prefix=prefix, tools=[dict(tool) for tool in tools] or None
    )  # fmt: skip
    return ResponseParts(parser, marks)


def _fits(template: Mapping[str, Any], prefix: str) -> bool:
    """Whether the chat template is one that the notation was written for; else the parser would read the question."""
    anchor = template.get("start_anchor")
    anchors = [anchor] if isinstance(anchor, str) else anchor
    return anchors is None or any(text in prefix for text in anchors)


def _has_thoughts(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _OPEN in tokenizer.added_tokens_encoder or any(
        mark in str(tokenizer.chat_template or "") for mark in (_OPEN, _CLOSE)
    )


class ResponseParts:
    """Splits one answer as it comes. Text that is not what the notation promises stays content, as it is."""

    def __init__(self, parser: Any, marks: Collection[str] | None = None) -> None:
        """`parser` is Transformers' own, which has read what the chat template wrote of the answer.

        `marks` are the special tokens it must see, by default all.
        """
        self.marks = True if marks is None else marks
        self._parser = parser
        self._pending: list[str] = []  # pieces of a tool call that is still open
        self._unsaid = ""  # what was fed and is not yet in a part or a call

    def feed(self, text: str) -> list[TextDelta | ToolCall]:
        """Return what `text` completes."""
        if self._parser is None:
            return [TextDelta(text)] if text else []
        self._unsaid += text
        return self._read(lambda: self._parser.feed(text))

    def flush(self) -> list[TextDelta | ToolCall]:
        """Return what was held back, at the end."""
        return [] if self._parser is None else self._read(lambda: self._parser.finalize()[1])

    def _read(self, step: Callable[[], list[dict[str, Any]]]) -> list[TextDelta | ToolCall]:
        try:
            return [said for event in step() for said in self._say(event)]
        except (ValueError, KeyError, TypeError) as error:
            logger.info("the answer is not in the model's notation: %s", error)
            self._parser, rest = None, self._unsaid
            return [TextDelta(rest)] if rest else []

    def _say(self, event: dict[str, Any]) -> Iterator[TextDelta | ToolCall]:
        field = event.get("field")
        if event["type"] == "region_chunk" and not event.get("dirty"):
            self._forget(event["text"])
            if field == "content" or field in _THOUGHTS:
                yield TextDelta(event["text"], is_thought=field in _THOUGHTS)
        elif event["type"] == "region_chunk":
            self._pending.append(event["text"])
        elif event["type"] == "region_close" and field == "tool_calls":
            values = event["value"] if isinstance(event["value"], list) else [event["value"]]
            calls = [_call(value) for value in values]
            for text in self._pending:
                self._forget(text)
            self._pending.clear()
            yield from calls

    def _forget(self, text: str) -> None:
        """Events hand over what was fed piece by piece, in order, without the marks between."""
        self._unsaid = self._unsaid[self._unsaid.index(text) + len(text) :]


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
