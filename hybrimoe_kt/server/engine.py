"""What the server needs of a loaded model."""

from __future__ import annotations

from typing import Protocol

from hybrimoe_kt.engine.answer import Generates
from hybrimoe_kt.engine.facts import Counters, ModelInfo

__all__ = ["Engine"]


class Engine(Generates, Protocol):
    """A model that answers requests; `hybrimoe_kt.engine.engine.Engine` is one.

    `begin`, `step` and `leave` are called by one thread. `vocabulary` is used by one at a time, and all else may be
    asked by any.
    """

    @property
    def parallel(self) -> int:
        """Answers that its steps bring on at once."""

    @property
    def model_name(self) -> str:
        """As its file says."""

    @property
    def context_tokens(self) -> int:
        """Tokens of prompt and answer together, at most."""

    def check_length(self, prompt: list[int]) -> None:
        """CapacityError when the context cannot hold it, ModelError for tokens the model does not have."""

    def info(self) -> ModelInfo:
        """What the model is."""

    def counters(self) -> Counters:
        """What was counted since it was loaded."""
