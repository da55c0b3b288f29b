"""A decoder layer without its experts, described: what graphs are made of, whatever model it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hybrimoe_kt.device.packed import PackedMatrix

from .choice import Choice

__all__ = [
    "GatedLinear",
    "GroupedQuery",
    "HeadParts",
    "Latent",
    "LayerParts",
    "Matrix",
    "Norm",
    "Rotary",
    "SharedExpert",
    "Swiglu",
]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A linear layer: parts one above the other, and a bias, float32 `[rows]`."""

    parts: tuple[PackedMatrix, ...]
    bias: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """Root mean square norm: factors float32 `[width]`."""

    factors: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Rotary positions of a head's first `dims` dimensions."""

    divisors: torch.Tensor
    """Positions a radian, of each pair, float32 `[dims // 2]`."""
    is_paired: bool
    """Whether neighbours are rotated together; else the two halves."""
    magnitude: float = 1.0

    @property
    def dims(self) -> int:
        return 2 * self.divisors.numel()


@dataclass(frozen=True, slots=True, eq=False)
class GroupedQuery:
    """Attention whose heads share keys and values in groups."""

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rotary: Rotary | None = None
    query_norm: Norm | None = None
    """As wide as a head, or as all of them together."""
    key_norm: Norm | None = None
    is_gated: bool = False
    """Whether a head's query is followed by as many values whose sigmoid multiplies its answer."""
    window: int = 0
    """How many tokens are looked back at, the own one included; 0: all."""
    sinks: torch.Tensor | None = None
    """A logit more for each head that nothing answers, float32 `[heads]`."""
    logit_cap: float = 0.0
    """What logits stay below, by a tangent; 0: nothing."""

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def value_width(self) -> int:
        return self.value.rows


@dataclass(frozen=True, slots=True, eq=False)
class Latent:
    """Multi-head latent attention with the up-projections absorbed."""

    query: Matrix
    """From the hidden states, or from `query_down`'s normalised answer."""
    query_down: Matrix | None
    query_norm: Norm | None
    latent: Matrix
    """To the latent and the rotated part of the key."""
    latent_norm: Norm
    to_latent: PackedMatrix
    """Of each head `[rank, nope]`."""
    to_value: PackedMatrix
    """Of each head `[value, rank]`, `value_stride` bytes apart where they do not follow each other."""
    value_stride: int
    value_offset: int
    output: Matrix
    heads: int
    rank: int
    nope: int
    value: int
    scale: float
    rotary: Rotary

    @property
    def key_width(self) -> int:
        return self.rank + self.rotary.dims

    @property
    def value_width(self) -> int:
        return self.rank

    @property
    def window(self) -> int:
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class GatedLinear:
    """Linear attention by the gated delta rule, behind a convolution of each channel over the latest tokens."""

    inputs: Matrix
    """To queries, keys and values of all heads, and to gates where `gate` is None."""
    gate: Matrix | None
    rates: Matrix
    """To betas and decays, by turns for `rates_run` heads each."""
    rates_run: int
    output: Matrix
    kernel: torch.Tensor
    """float32 `[tokens, channels]`, the latest token last; channels are those of queries, keys and values."""
    decay: torch.Tensor
    """What multiplies the decays, negative, float32 `[value_heads]`."""
    decay_bias: torch.Tensor
    """float32 `[value_heads]`."""
    norm: Norm
    """Of each head's answer."""
    key_heads: int
    value_heads: int
    head_dim: int
    is_tiled: bool
    """Whether value head `h` asks key head `h % key_heads`; else neighbours ask the same."""
    order: torch.Tensor | None = None
    """Where each head of queries, keys, values and gates is in what `inputs` answers, int32; None: in this order."""

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.head_dim


@dataclass(frozen=True, slots=True, eq=False)
class Swiglu:
    """A feed-forward layer `down(silu(gate) * up)`."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True, eq=False)
class SharedExpert:
    """A feed-forward layer that every token passes, multiplied by the sigmoid of a product where it has a gate."""

    body: Swiglu
    gate: Matrix | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """All of a decoder layer but the routed experts."""

    attention_norm: Norm
    attention: GroupedQuery | Latent | GatedLinear
    feed_forward_norm: Norm
    dense: Swiglu | None = None
    """In place of experts."""
    router: torch.Tensor | None = None
    """float32 `[num_experts, hidden]`."""
    router_bias: torch.Tensor | None = None
    """Added to the logits, float32 `[num_experts]`."""
    choice: Choice | None = None
    """How experts follow from the router's logits; None where nobody knows but the router itself."""
    shared: Sequence[SharedExpert] = ()
    residual_factor: float = 1.0
    """On what is added to the residual stream."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadParts:
    """What follows the last layer."""

    norm: Norm
    head: Matrix
    logit_factor: float = 1.0
