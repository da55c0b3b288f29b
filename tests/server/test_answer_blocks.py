"""An answer's events as blocks: what is said is in one of them, in order, and white space alone makes none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from hybrimoe_kt.engine.events import Event, Finished, TextDelta, ToolCall
from hybrimoe_kt.engine.sampler import Sampled
from hybrimoe_kt.engine.vocabulary import Vocabulary
from hybrimoe_kt.server.answer_blocks import Begun, Block, BlockEvent, Ended, Grown, blocks

from .scripted import ScriptedEngine

CALL = ToolCall("f", {"a": 1})


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return ScriptedEngine().vocabulary


def made_of(vocabulary: Vocabulary, events: Sequence[Event], reason: str = "stop") -> list[BlockEvent]:
    async def come() -> AsyncIterator[Event]:
        for event in (*events, Finished(reason)):
            yield event

    async def gather() -> list[BlockEvent]:
        return [event async for event in blocks(come(), vocabulary)]

    return asyncio.run(gather())


def ended(events: Sequence[BlockEvent]) -> list[Block]:
    """The blocks, after checking that each begins, grows to its text and ends before the next one."""
    whole: list[Block] = []
    open_block, text = None, ""
    assert isinstance(events[-1], Finished)
    for event in events[:-1]:
        if isinstance(event, Begun):
            assert open_block is None and event.block.index == len(whole)
            open_block, text = event.block, ""
        elif isinstance(event, Grown):
            assert event.block is open_block
            text += event.text
        else:
            assert isinstance(event, Ended) and event.block is open_block and event.block.text == text
            whole.append(event.block)
            open_block = None
    assert open_block is None
    return whole


def thought(text: str) -> TextDelta:
    return TextDelta(text, is_thought=True)


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([], []),
        ([TextDelta(" \n")], []),
        ([thought("a"), thought("b"), TextDelta("c"), TextDelta(" ")], [("thoughts", "ab"), ("text", "c ")]),
        ([TextDelta("a"), thought("b"), TextDelta("c")], [("text", "a"), ("thoughts", "b"), ("text", "c")]),
        ([thought("a"), TextDelta("\n"), CALL, TextDelta("\n"), CALL], [("thoughts", "a"), ("call", ""), ("call", "")]),
        ([TextDelta("\n"), TextDelta("\n"), TextDelta("a"), CALL], [("text", "\n\na"), ("call", "")]),
        ([CALL, TextDelta("\n"), TextDelta("a")], [("call", ""), ("text", "\na")]),
        ([TextDelta("\n"), thought("a")], [("thoughts", "a")]),
        ([TextDelta("a"), TextDelta("", is_thought=True), TextDelta("b")], [("text", "ab")]),
    ],
)
def test_what_is_said_is_in_blocks(
    vocabulary: Vocabulary, events: list[Event], wanted: list[tuple[str, str]]
) -> None:  # fmt: skip
    whole = ended(made_of(vocabulary, events))
    assert [(block.kind, block.text) for block in whole] == wanted
    assert all((block.call is CALL) == (block.kind == "call") for block in whole)


def test_the_block_that_the_length_ends_is_cut(vocabulary: Vocabulary) -> None:
    def cut(reason: str) -> list[bool]:
        events = made_of(vocabulary, [thought("a"), CALL, TextDelta("b")], reason)
        return [event.is_cut for event in events if isinstance(event, Ended)]

    assert cut("length") == [False, False, True]
    assert cut("stop") == [False, False, False]


def test_a_text_has_the_log_probabilities_of_its_tokens(vocabulary: Vocabulary) -> None:
    def drawn(text: str, *, is_thought: bool = False) -> TextDelta:
        tokens = vocabulary.text_ids(text)
        return TextDelta(text, is_thought, tuple(Sampled(token, -0.5, ()) for token in tokens))

    end = TextDelta("", False, (Sampled(vocabulary.text_ids("<|im_end|>")[0], -0.5, ()),))
    events = made_of(vocabulary, [drawn("hm", is_thought=True), drawn("\n"), drawn("a b"), drawn("c"), end])
    thoughts, text = ended(events)
    assert thoughts.logprobs == []
    assert "".join(one["token"] for one in text.logprobs).startswith("\na bc")
    grown = [one for event in events if isinstance(event, Grown) for one in event.logprobs]
    assert grown == text.logprobs
