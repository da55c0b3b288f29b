"""What an answer consists of as it comes, and the whole of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sampler import Sampled

__all__ = ["Answer", "Event", "Finished", "PromptRead", "TextDelta", "ToolCall"]


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The prompt's tokens with their log-probabilities, when those were asked for; comes before all else."""

    sampled: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next stretch of text, and the tokens drawn since the one before when log-probabilities were asked for."""

    text: str
    is_thought: bool = False
    """Whether the model thinks; else it is the answer's content."""
    sampled: tuple[Sampled, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call; `arguments` are the JSON object that the model wrote."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""
    """What the model, or its chat template, wants it to be called; empty: whatever one likes."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How the answer ended ("stop", "length", "tool_calls", "cancelled"), and what it took (`Engine.last_run`)."""

    reason: str
    run: Mapping[str, Any] = field(default_factory=dict)
    stop_string: str = ""
    """The one that ended it, if one did."""


Event = PromptRead | TextDelta | ToolCall | Finished


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `str(answer)` is its text."""

    text: str
    """The content, without thoughts and tool calls."""
    thoughts: str = ""
    """What the model wrote before it, where the model's notation is known."""
    tool_calls: tuple[ToolCall, ...] = ()
    reason: str = "stop"
    """Why it ended: "stop", "length" (the longest allowed), "tool_calls" or "cancelled"."""
    sampled: tuple[Sampled, ...] = ()
    """Its tokens with their log-probabilities, when `Sampling.num_logprobs` asks for them."""
    prompt_sampled: tuple[Sampled, ...] = ()
    """The prompt's tokens likewise, when `Sampling.num_prompt_logprobs` does."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """What it took: tokens, seconds, rates and expert counts, see `Engine.last_run`."""

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of(cls, events: Iterable[Event]) -> Answer:
        """Put an answer together from its events, `Finished` last."""
        text, thoughts, finished = "", "", Finished("stop")
        calls: list[ToolCall] = []
        sampled: list[Sampled] = []
        prompt: tuple[Sampled, ...] = ()
        for event in events:
            if isinstance(event, PromptRead):
                prompt = event.sampled
            elif isinstance(event, ToolCall):
                calls.append(event)
            elif isinstance(event, Finished):
                finished = event
            else:
                sampled += event.sampled
                text += "" if event.is_thought else event.text
                thoughts += event.text if event.is_thought else ""
        return cls(text, thoughts, tuple(calls), finished.reason, tuple(sampled), prompt, finished.run)
