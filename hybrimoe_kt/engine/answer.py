"""One answer as a sequence of events: text, thoughts, tool calls, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .detokenizer import IncrementalDetokenizer
from .events import Event, Finished, PromptRead, TextDelta, ToolCall
from .response_parts import ResponseParts
from .sampler import Sampled
from .sampling import Sampling
from .stop_strings import StopStrings
from .vocabulary import Vocabulary

__all__ = ["Generates", "Request", "answer"]


class Generates(Protocol):
    """What gives the tokens of an answer: an `Engine`, or a script in tests."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Turns tokens into text."""

    def generate(self, prompt: list[int], sampling: Sampling, stop: threading.Event) -> Generator[Sampled, None, None]:
        """Yield the tokens of an answer until it ends or `stop` is set; `sampling` may want the prompt's before."""

    def last_run(self) -> dict[str, Any]:
        """The numbers of the last answer, or of the one being given; `finish` says why it ended."""


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


def answer(engine: Generates, request: Request, stop: threading.Event) -> Generator[Event, None, None]:
    """Answer one request: yield what comes until it ends or `stop` is set; `Finished` comes last."""
    return _Answer(engine, request).events(stop)


class _Answer:
    """What an answer remembers on its way."""

    def __init__(self, engine: Generates, request: Request) -> None:
        self._engine, self._request = engine, request
        self._stops = StopStrings(request.stop_strings)
        self._read: list[Sampled] = []
        self._sampled: list[Sampled] = []
        self._num_calls = 0

    def events(self, stop: threading.Event) -> Generator[Event, None, None]:
        request = self._request
        text = self._engine.vocabulary.detokenizer(keep_special=request.parts.marks if request.parts else False)
        with closing(self._engine.generate(request.prompt, request.sampling, stop)) as tokens:
            for sampled in tokens:
                if sampled.place == "prompt":
                    self._read.append(sampled)
                    if len(self._read) == len(request.prompt):
                        yield PromptRead(tuple(self._read))
                    continue
                if request.sampling.num_logprobs is not None:
                    self._sampled.append(sampled)
                if sampled.place == "end":
                    break
                yield from self._say(self._stops.feed(text.step(sampled.token)))
                if self._is_over:
                    break
        yield from self._say(self._rest(text), is_last=True)
        yield Finished(self._reason(), self._engine.last_run(), self._stops.which)

    def _rest(self, text: IncrementalDetokenizer) -> str:
        return "" if self._stops.found else self._stops.feed(text.flush()) + self._stops.flush()

    @property
    def _is_over(self) -> bool:
        return self._stops.found or (self._request.one_call and self._num_calls > 0)

    def _reason(self) -> str:
        reason = "stop" if self._is_over else str(self._engine.last_run()["finish"])
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
