"""One answer as a sequence of events: text, thoughts, tool calls, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .chat.response_parts import ResponseParts
from .chat.turns import NO_TURNS, Turns
from .events import Event, Finished, PromptRead, TextDelta, ToolCall
from .sampler import Sampled
from .sampling import Sampling
from .text.detokenizer import IncrementalDetokenizer
from .text.stop_strings import StopStrings
from .vocabulary import Vocabulary

__all__ = ["BegunAnswer", "Generates", "Generating", "Request", "answer"]


class Generating(Protocol):
    """An answer's tokens on their way; a `Generation` is one."""

    @property
    def is_over(self) -> bool:
        """Whether nothing comes any more, but for what `take` still has."""

    @property
    def error(self) -> Exception | None:
        """What has ended it, if not its own end."""

    def take(self) -> Sampled | None:
        """Return the next token, None where there is none yet; `sampling` may want the prompt's before."""

    def numbers(self) -> dict[str, Any]:
        """Its counts, times and rates, also while it runs; `finish` says why it ended."""


class Generates(Protocol):
    """What gives the tokens of answers: an `Engine`, or a script in tests."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Turns tokens into text."""

    def begin(
        self, prompt: list[int], sampling: Sampling, stop: threading.Event, turns: Turns = NO_TURNS
    ) -> Generating:
        """Let an answer wait for its turn; it ends once `stop` is set."""

    def step(self) -> None:
        """Bring every answer that was begun on by one step."""

    def leave(self, generating: Any, finish: str = "cancelled") -> None:
        """Nobody wants the rest of one that `begin` has returned; nothing, where it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt, ready to be answered."""

    prompt: list[int]
    """Token ids."""
    sampling: Sampling
    stop_strings: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    parts: ResponseParts | None = None
    """Splits thoughts and tool calls off; None leaves the text as the model writes it. Used up by one answer."""
    one_call: bool = False
    """End after the first tool call."""
    turns: Turns = NO_TURNS
    """Where they begin in the prompt, as far as that is known."""


def answer(engine: Generates, request: Request, stop: threading.Event) -> Generator[Event, None, None]:
    """Answer one request: yield what comes until it ends or `stop` is set; `Finished` comes last."""
    begun = BegunAnswer(engine, request, stop)
    try:
        while True:
            yield from begun.events()
            if begun.is_over:
                return
            engine.step()
    finally:
        begun.leave()


class BegunAnswer:
    """An answer that an engine's steps bring on: its tokens become events."""

    def __init__(self, engine: Generates, request: Request, stop: threading.Event) -> None:
        self._engine, self._request = engine, request
        self._stops = StopStrings(request.stop_strings)
        self._read: list[Sampled] = []
        self._sampled: list[Sampled] = []
        self._num_calls = 0
        self._text = engine.vocabulary.detokenizer(keep_special=request.parts.marks if request.parts else False)
        self._tokens = engine.begin(request.prompt, request.sampling, stop, request.turns)
        self.is_over = False
        """Whether `Finished` has come."""
        self.has_told = False
        """For whoever counts when the first text came."""

    def numbers(self) -> dict[str, Any]:
        """Counts, times and rates so far."""
        return self._tokens.numbers()

    def leave(self) -> None:
        """Nobody wants the rest."""
        self._engine.leave(self._tokens)

    def events(self) -> Generator[Event, None, None]:
        """Yield what has come since; raises what has ended it, once all else is told."""
        while not self._is_over and (sampled := self._tokens.take()) is not None:
            if sampled.place == "prompt":
                self._read.append(sampled)
                if len(self._read) == len(self._request.prompt):
                    yield PromptRead(tuple(self._read))
                continue
            if self._request.sampling.num_logprobs is not None:
                self._sampled.append(sampled)
            if sampled.place == "answer":
                yield from self._say(self._stops.feed(self._text.step(sampled.token)))
        if not (self._is_over or self._tokens.is_over):
            return
        if self._is_over:
            self._engine.leave(self._tokens, "stop")
        elif self._tokens.error is not None:
            raise self._tokens.error
        yield from self._say(self._rest(self._text), is_last=True)
        self.is_over = True
        yield Finished(self._reason(), self._tokens.numbers(), self._stops.which)

    def _rest(self, text: IncrementalDetokenizer) -> str:
        return "" if self._stops.found else self._stops.feed(text.flush()) + self._stops.flush()

    @property
    def _is_over(self) -> bool:
        return self._stops.found or (self._request.one_call and self._num_calls > 0)

    def _reason(self) -> str:
        reason = "stop" if self._is_over else str(self._tokens.numbers()["finish"])
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _say(self, text: str, *, is_last: bool = False) -> Iterator[TextDelta | ToolCall]:
        for event in self._split(text, is_last):
            if isinstance(event, ToolCall):
                self._num_calls += 1
                if self._request.one_call and self._num_calls > 1:
                    return
                yield event
            elif event.text and not (self._request.one_call and self._num_calls):
                yield replace(event, sampled=self._take_sampled())
        if is_last and self._sampled:
            yield TextDelta("", False, self._take_sampled())

    def _split(self, text: str, is_last: bool) -> list[TextDelta | ToolCall]:
        parts = self._request.parts
        if parts is None:
            return [TextDelta(text)] if text else []
        return parts.feed(text) + (parts.flush() if is_last else [])

    def _take_sampled(self) -> tuple[Sampled, ...]:
        sampled, self._sampled = tuple(self._sampled), []
        return sampled
