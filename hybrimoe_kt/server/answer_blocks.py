"""An answer as the blocks that some interfaces make of it: thoughts, texts and tool calls, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from hybrimoe_kt.engine.events import Event, Finished, TextDelta, ToolCall
from hybrimoe_kt.engine.vocabulary import Vocabulary

from .logprobs import ShownLogprobs

__all__ = ["Begun", "Block", "BlockEvent", "Ended", "Grown", "blocks"]

Kind = Literal["thoughts", "text", "call"]


@dataclass(slots=True)
class Block:
    """A block on its way."""

    kind: Kind
    index: int
    """Its number among the answer's blocks."""
    text: str = ""
    call: ToolCall | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of a text's tokens, when those were asked for, as `ShownLogprobs.of_chat` has them."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A block begins; that of a call has all of it."""

    block: Block


@dataclass(frozen=True, slots=True)
class Grown:
    """A block has become longer by `text`; the block has it already."""

    block: Block
    text: str
    logprobs: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Ended:
    """A block is whole; `is_cut` when the answer was cut short within it."""

    block: Block
    is_cut: bool = False


BlockEvent = Begun | Grown | Ended | Finished


async def blocks(events: AsyncIterator[Event], vocabulary: Vocabulary) -> AsyncIterator[BlockEvent]:
    """Yield one answer's blocks as they come, `Finished` last.

    White space alone, as models write it around tool calls, is no block.
    """
    making = _Blocks(ShownLogprobs(vocabulary))
    async for event in events:
        for made in making.feed(event):
            yield made


class _Blocks:
    def __init__(self, shown: ShownLogprobs) -> None:
        self._shown = shown
        self._num_begun = 0
        self._open: Block | None = None
        self._held = Block("text", -1)  # white space, with which the next block may begin

    def feed(self, event: Event) -> list[BlockEvent]:
        if isinstance(event, TextDelta):
            logprobs = self._shown.of_chat(event.text, event.sampled)
            return self._said("thoughts" if event.is_thought else "text", event.text, logprobs)
        if isinstance(event, ToolCall):
            made = self._end()
            return [*made, Begun(self._begin("call", event)), *self._end()]
        if isinstance(event, Finished):
            return [*self._end(is_cut=event.reason == "length"), event]
        return []

    def _said(self, kind: Kind, text: str, logprobs: list[dict[str, Any]]) -> list[BlockEvent]:
        made: list[BlockEvent] = []
        block = self._open
        if block is None or (block.kind != kind and text):
            held = self._held if self._held.kind == kind else Block(kind, -1)
            made += self._end()
            text, logprobs = held.text + text, held.logprobs + logprobs
            if not text.strip():
                self._held = Block(kind, -1, text, logprobs=logprobs)
                return made
            block = self._begin(kind)
            made.append(Begun(block))
        told = logprobs if block.kind == "text" else []
        block.text += text
        block.logprobs += told
        return [*made, Grown(block, text, told)] if text or told else made

    def _begin(self, kind: Kind, call: ToolCall | None = None) -> Block:
        self._open = block = Block(kind, self._num_begun, call=call)
        self._num_begun += 1
        return block

    def _end(self, *, is_cut: bool = False) -> list[BlockEvent]:
        self._held = Block("text", -1)
        block, self._open = self._open, None
        return [] if block is None else [Ended(block, is_cut)]
