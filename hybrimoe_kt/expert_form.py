"""What an expert computes between its matrices: as data, which every backend takes or refuses with a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from hybrimoe_kt.errors import ModelError

__all__ = ["ACTIVATIONS", "SWIGLU", "Activation", "ExpertForm", "FormOf", "plain_form"]

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu2")


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """`down(activation(gate x) * (up x + up_offset))`, or `down(activation(up x))` for experts without a gate."""

    activation: Activation = "silu"
    """`relu2` is the square of ReLU, `gelu_tanh` GELU by its tangent. silu(x) is x * sigmoid(alpha * x)."""
    is_gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    """Before anything else the gate is cut to at most this, up to between its negative and itself."""
    cuts_activated: bool = False
    """The gate is cut behind its activation instead."""
    up_offset: float = 0.0
    has_biases: bool = False
    """Each matrix has one."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ModelError(f"experts with activation {self.activation!r} are not supported; {_LISTED} are")
        if self.alpha != 1.0 and self.activation != "silu":
            raise ModelError(f"alpha is of silu, these experts have {self.activation}")
        if not self.is_gated and (self.limit is not None or self.up_offset):
            raise ModelError("experts without a gate have neither limit nor offset")
        if self.limit is not None and self.limit <= 0:
            raise ModelError(f"a limit of {self.limit:g} leaves nothing of an expert")
        if self.cuts_activated and (self.limit is None or self.activation != "silu" or self.alpha != 1.0):
            raise ModelError("what is cut behind the activation is silu, and by a limit")

    @property
    def is_swiglu(self) -> bool:
        """Whether gate and up are joined as in most models: `silu(gate x) * up x`."""
        return replace(self, has_biases=False) == SWIGLU

    @property
    def is_clamped_swiglu(self) -> bool:
        """Whether it is gpt-oss's: cut, with a gain of its own, and one added to up."""
        return self.activation == "silu" and self.limit is not None and self.up_offset == 1.0

    @property
    def gate_limit(self) -> float | None:
        """What cuts the gate in front of its activation to the same effect: silu is `limit` there, and grows."""
        if self.limit is None or not self.cuts_activated:
            return self.limit
        found = max(self.limit, 1.0)
        for _ in range(50):  # Newton's method
            share = 1.0 / (1.0 + math.exp(-found))
            found -= (found * share - self.limit) / (share * (1.0 + found * (1.0 - share)))
        return found

    def joined(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """What enters down, of the products of gate and up."""
        if not self.is_gated:
            return self._activated(up)
        assert gate is not None, "gated experts have a gate"
        if self.limit is not None:
            gate = gate if self.cuts_activated else gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        activated = self._activated(gate)
        activated = activated.clamp(max=self.limit) if self.cuts_activated else activated
        return activated * (up + self.up_offset if self.up_offset else up)

    def _activated(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == "silu":
            return functional.silu(x) if self.alpha == 1.0 else x * torch.sigmoid(self.alpha * x)
        if self.activation == "relu2":
            return functional.relu(x).square()
        return functional.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def describe(self) -> str:
        """In a few words, as errors and reports name it: "silu, limit 7"."""
        said = [self.activation if self.alpha == 1.0 else f"silu with gain {self.alpha:g}"]
        said += [] if self.is_gated else ["no gate"]
        said += [] if self.limit is None else [f"limit {self.limit:g}{' behind it' if self.cuts_activated else ''}"]
        said += [f"{self.up_offset:+g} on up"] if self.up_offset else []
        said += ["biases"] if self.has_biases else []
        return ", ".join(said)


SWIGLU = ExpertForm()
"""What most models have."""
FormOf = Callable[[int], ExpertForm]
"""What the experts of a layer compute, by its number in the model."""


def plain_form(layer: int) -> ExpertForm:
    """As of `FormOf`: gate and up joined as in most models."""
    return SWIGLU


_LISTED = f"{', '.join(ACTIVATIONS[:-1])} and {ACTIVATIONS[-1]}"
