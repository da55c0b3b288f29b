"""What the server needs of a loaded model."""

from __future__ import annotations

from typing import Protocol

from hybrimoe_kt.engine.answer import Generates
from hybrimoe_kt.engine.facts import Counters, ModelInfo

__all__ = ["Engine"]


class Engine(Generates, Protocol):
    """A model that answers one request at a time; `hybrimoe_kt.engine.engine.Engine` is one.

    `generate` is called by one thread. `vocabulary` is used by one at a time, and all else may be asked by any.
    """

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
