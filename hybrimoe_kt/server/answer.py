"""One answer as a sequence of events: text, thoughts, tool calls, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from .stop_strings import StopStrings

__all__ = ["Ask", "Call", "End", "Engine", "Event", "Said", "answer"]


class Drawn(Protocol):
    """A token that was drawn; see `host.hf.sampling`."""

    token: int
    logprob: float | None
    likeliest: tuple[tuple[int, float], ...]


class Engine(Protocol):
    """What the server needs of a loaded model."""

    model_name: str
    context_tokens: int
    model: Any
    tokenizer: Any
    runtime: Any

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        template_options: Mapping[str, Any] | None,
    ) -> list[int]:
        """Token ids of a conversation."""

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text."""

    def check_length(self, prompt: list[int]) -> None:
        """CapacityError when the context cannot hold it."""

    def pieces(self, *, keep_special: bool) -> Any:
        """What turns tokens into text."""

    def draws(self, prompt: list[int], sampling: Any, stop: threading.Event) -> Iterator[Drawn]:
        """The tokens of an answer."""

    def last_run(self) -> dict[str, Any]:
        """The numbers of the last answer, or of the one being given."""


class Parts(Protocol):
    """Splits text into content, thoughts and calls; see `host.hf.response_format`."""

    def feed(self, text: str) -> list[Any]:
        """What `text` completes."""

    def flush(self) -> list[Any]:
        """What was held back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, ready to be answered."""

    prompt: list[int]
    sampling: Any
    stops: tuple[str, ...] = ()
    parts: Parts | None = None
    one_call: bool = False
    """End after the first tool call."""


@dataclass(frozen=True, slots=True)
class Said:
    """Text, and the tokens drawn since the text before (when log-probabilities were asked for)."""

    text: str
    is_thought: bool = False
    drawn: tuple[Drawn, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class End:
    """How the answer ended ("stop", "length", "tool_calls", "cancelled"), and what it took."""

    finish: str
    run: Mapping[str, Any] = field(default_factory=dict)


Event = Said | Call | End


def answer(engine: Engine, ask: Ask, stop: threading.Event) -> Iterator[Event]:
    """Answer one request: yield what is said until it ends or `stop` is set; `End` comes last."""
    return _Answer(engine, ask).events(stop)


class _Answer:
    """What an answer remembers on its way."""

    def __init__(self, engine: Engine, ask: Ask) -> None:
        self._engine, self._ask = engine, ask
        self._stops = StopStrings(ask.stops)
        self._drawn: list[Drawn] = []
        self._num_calls = 0

    def events(self, stop: threading.Event) -> Iterator[Event]:
        ask = self._ask
        pieces = self._engine.pieces(keep_special=ask.parts is not None)
        with closing(self._engine.draws(ask.prompt, ask.sampling, stop)) as draws:  # type: ignore[type-var]
            for drawn in draws:
                if ask.sampling.num_logprobs is not None:
                    self._drawn.append(drawn)
                yield from self._say(self._stops.feed(pieces.step(drawn.token)))
                if self._is_over:
                    break
        rest = "" if self._stops.found else self._stops.feed(pieces.flush()) + self._stops.flush()
        yield from self._say(rest, is_last=True)
        yield End(self._finish(), self._engine.last_run())

    @property
    def _is_over(self) -> bool:
        return self._stops.found or (self._ask.one_call and self._num_calls > 0)

    def _finish(self) -> str:
        finish = "stop" if self._is_over else str(self._engine.last_run()["finish"])
        return "tool_calls" if finish == "stop" and self._num_calls else finish

    def _say(self, text: str, *, is_last: bool = False) -> Iterator[Said | Call]:
        for said in self._split(text, is_last):
            if hasattr(said, "arguments"):
                self._num_calls += 1
                if self._ask.one_call and self._num_calls > 1:
                    return
                yield Call(said.name, said.arguments)
            elif said.text and not (self._ask.one_call and self._num_calls):
                yield Said(said.text, said.is_thought, self._take_drawn())
        if is_last and self._drawn:
            yield Said("", False, self._take_drawn())

    def _split(self, text: str, is_last: bool) -> list[Any]:
        parts = self._ask.parts
        if parts is None:
            return [Said(text)] if text else []
        return parts.feed(text) + (parts.flush() if is_last else [])

    def _take_drawn(self) -> tuple[Drawn, ...]:
        drawn, self._drawn = tuple(self._drawn), []
        return drawn
