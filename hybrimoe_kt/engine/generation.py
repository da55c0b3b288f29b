"""One prompt on its way to its answer, token by token, beside others."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .chat.turns import NO_TURNS, Turns
from .memory.conversation import Conversation
from .sampler import Sampled, Sampler
from .sampling import Sampling
from .steps.prompt_scores import PromptScores

__all__ = ["Generation", "Run"]


@dataclass(slots=True)
class Run:
    """What one answer took; times in seconds, counts of the time it took: with others beside it theirs as well."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    misses: int = 0
    experts_on_cpu: int = 0
    experts_on_gpu: int = 0
    transfers: int = 0
    transferred_bytes: int = 0
    prefetches: int = 0
    finish: str = "stop"

    def as_dict(self) -> dict[str, Any]:
        """All fields and the rates derived from them."""
        computed = self.prompt_tokens - self.reused_tokens
        later = max(0, self.new_tokens - 1)  # the first token comes out of the prefill
        return asdict(self) | {
            "prefill_tokens_per_s": computed / self.prefill_s if self.prefill_s else 0.0,
            "decode_tokens_per_s": later / self.decode_s if self.decode_s else 0.0,
            "hit_rate": self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0,
        }


class Generation:
    """Made by `TokenGenerator.begin`; steps of its batch bring it on."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        sampler: Sampler,
        *,
        end_ids: Collection[int],
        most_tokens: int,
        stop: threading.Event,
        turns: Turns = NO_TURNS,
    ) -> None:
        """`most_tokens` of prompt and answer."""
        self.prompt, self.sampling, self.stop, self.turns = prompt, sampling, stop, turns
        self._sampler, self._end_ids = sampler, end_ids
        self._limit = min(sampling.max_new_tokens, most_tokens - len(prompt))
        self.ids = list(prompt)
        """Those of the prompt, and drawn ones behind them."""
        self.run = Run(prompt_tokens=len(prompt))
        self.conversation: Conversation | None = None
        """Holds the first of `ids`; None before its prompt is read, and once it is over."""
        self.scores: PromptScores | None = None
        if sampling.num_prompt_logprobs is not None:
            self.scores = PromptScores(prompt, sampling.num_prompt_logprobs)
        self.is_over = False
        self.error: Exception | None = None
        """What ended it; to be raised once all that was drawn has been taken."""
        self.num_before: dict[str, int] = {}
        """The runtime's counters as they stood when it began."""
        self._drawn: deque[Sampled] = deque()
        self._told: dict[str, Any] = {}
        self._began_s = self._last_s = time.perf_counter()
        self._read_s = 0.0
        self._between_s: list[float] = []
        """From one token to the next."""

    def take(self) -> Sampled | None:
        """Return the next token that was drawn, or the prompt's that were asked for; None where there is none yet."""
        return self._drawn.popleft() if self._drawn else None

    def numbers(self) -> dict[str, Any]:
        """The run's counts, times and rates; also while it runs."""
        return self.run.as_dict() | self._told

    @property
    def left(self) -> list[int]:
        """Tokens that are to be computed next."""
        held = 0 if self.conversation is None else len(self.conversation.ids)
        return self.ids[held:]

    @property
    def is_reading(self) -> bool:
        """Whether more than the token drawn last is left to compute."""
        conversation = self.conversation
        if conversation is None:
            return True
        return len(self.ids) - len(conversation.ids) > 1 or self.run.new_tokens == 0

    def begin(self, conversation: Conversation) -> None:
        """Go on from what a conversation holds of `ids`."""
        if self.run.new_tokens == 0:
            self.run.reused_tokens = len(conversation.ids)
            self._began_s = time.perf_counter()
        self.conversation = conversation

    def receive(self, logits: torch.Tensor) -> None:
        """Draw the next token from `logits [vocab]` of the last one of `ids`."""
        now = time.perf_counter()
        run = self.run
        if run.new_tokens == 0:
            run.prefill_s, self._read_s = now - self._began_s, now
            if self.scores is not None:
                self._drawn.extend(self.scores.sampled())
        if not self._limit:
            self.end("length")
            return
        sampled = self._sampler(logits)
        if sampled.token in self._end_ids:
            if self.scores is not None:
                self._drawn.append(sampled._replace(place="end"))
            self.end("stop")
            return
        self.ids.append(sampled.token)
        run.new_tokens += 1
        run.decode_s = time.perf_counter() - self._read_s
        self._drawn.append(sampled)
        if run.new_tokens > 1:
            self._between_s.append(round(now - self._last_s, 6))
        self._last_s = now
        if self._sampler.is_over:  # held to a form that is complete
            self.end("stop")
        elif run.new_tokens >= self._limit:
            self.end("length")
        self.scores = None

    def end(self, finish: str, error: Exception | None = None) -> None:
        """Nothing more comes; whoever made it keeps its conversation."""
        self.run.finish, self.error, self.is_over = finish, error, True

    def close(self, counters: dict[str, int], told: dict[str, Any]) -> None:
        """Count what the run took, and say what else is to be told of it."""
        for name, value in counters.items():
            setattr(self.run, name, value - self.num_before.get(name, 0))
        self._told = told | {"between_s": tuple(self._between_s)}
