"""What an answer's text says beside its content: thoughts and tool calls, in the model family's own notation.

Transformers' parser finds what stands between marks as text comes; this is the only file that asks for it. A tokenizer
may bring Transformers' description of its notation along (`response_template`); else the one of our tables counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybrimoe_kt.host.hf.architectures import every_architecture

from .call_notations import CallNotation, calls_of
from .response_parts import ResponseParts, padded
from .thought_notations import WRAPPINGS, ThoughtNotation, thoughts_of

__all__ = ["PREFIX_TOKENS", "ResponseFormat", "ends_with", "response_format"]

_ANSWER = "<answer>"  # the anchor that the parser wants, in front of what the chat template wrote of the answer
PREFIX_TOKENS = 256  # holds the beginning of the answer that a chat template writes, such as "<think>\n"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The notation of one model's answers."""

    thoughts: ThoughtNotation | None
    calls: CallNotation | None
    wrappings: tuple[tuple[str, str], ...]
    own: Mapping[str, Any] | None
    """Transformers' description, where the tokenizer has one; it then counts instead of all else."""
    is_shown: bool = False
    """Whether the chat template shows the calls, so that they need no family's entry."""
    shown_tokens: tuple[str, ...] = ()
    """Texts of calls that the chat template has: they are not left out where calls are content."""

    @property
    def has_calls(self) -> bool:
        """Whether it has tool calls."""
        return self.calls is not None if self.own is None else "tool_calls" in self.own["fields"]

    @property
    def describes_tools(self) -> bool:
        """Whether tools can be told of in words where the chat template takes none."""
        return self.calls is not None and self.is_shown and self.calls.describes != ""

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
        prefix = str(tokenizer.decode(list(prompt[-PREFIX_TOKENS:])))
        if self.own is not None:
            template = _without_calls(self.own) if not tools else self.own
            return ResponseParts(_parser(tokenizer, template, prefix, tools), tools=tools)
        calls = self.calls if tools else None
        marks = self._marks(calls)
        if not marks:
            return None
        opened = self.thoughts.open if self.thoughts and ends_with(prefix, self.thoughts.open) else ""
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
            fields["tool_calls"] = {"open_pattern": padded(calls.open), "content_args": {"strip": False}}
            fields["tool_calls"] |= {"close_pattern": padded(calls.close)} if calls.close else {}
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
        is_shown=calls is not None and calls_of(template) is calls,
        shown_tokens=tuple(text for text in (calls.tokens if calls else ()) if text in template),
        wrappings=tuple(pair for pair in WRAPPINGS if all(mark in template for mark in pair)),
        own=getattr(tokenizer, "response_template", None),
    )


def _without_calls(template: Mapping[str, Any]) -> dict[str, Any]:
    return {**template, "fields": {name: field for name, field in template["fields"].items() if name != "tool_calls"}}


def ends_with(prompt: str, mark: str) -> bool:
    """Whether a chat template has written `mark` last, whatever white space came after it."""
    return prompt.rstrip().endswith(mark.rstrip())


def _parser(
    tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], prefix: str, tools: Sequence[Mapping[str, Any]]
) -> Any:
    return tokenizer.get_response_parser(dict(template), prefix=prefix, tools=[dict(tool) for tool in tools] or None)
