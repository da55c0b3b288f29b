"""Linear attention in a layer's graph: a convolution over the latest tokens, then the gated delta rule.

In the order in which the file has heads; what is kept of a conversation is read and written where it lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from .building import Builder
from .layer_pieces import linear, norm_of
from .library import I32
from .parts import GatedLinear

__all__ = ["StateAccess", "linear_attention"]

_EPSILON = 1e-6
"""Added to the squared length of queries and keys, in every implementation of the rule."""


class StateAccess(ABC):
    """Reads and writes what is kept of conversations, while their graph is made."""

    @abstractmethod
    def latest(self, mixed: int, channels: int, num_taps: int) -> list[int]:
        """Keep each token's channels `[channels, tokens]`; return those of it and the tokens before, the oldest first.

        As many tensors of that size as a convolution looks at.
        """

    @abstractmethod
    def read(self, query: int, key: int, value: int, decay: int, beta: int, width: int, heads: int) -> int:
        """Let the gated delta rule go on, see `Builder.delta_rule`; its answers `[width, heads, tokens]`."""


def linear_attention(builder: Builder, parts: GatedLinear, given: int, tokens: int, access: StateAccess) -> int:
    """Add it to a graph: its answer `[hidden, tokens]`."""
    width, heads, num_keys = parts.head_dim, parts.value_heads, 2 * parts.key_heads
    head, token = 4 * width, 4 * parts.channels
    mixed, gate = _inputs(builder, parts, given, tokens)
    mixed = _convolved(builder, parts, access.latest(mixed, parts.channels, len(parts.kernel)))
    keys = _of_length_one(builder, builder.view(mixed, (width, num_keys, tokens), (head, token)), width)
    if not parts.is_tiled and heads > parts.key_heads:
        num_keys = 2 * heads
        keys = builder.reshape(keys, width, 1, 2 * parts.key_heads, tokens)
        keys = builder.repeated(keys, width, heads // parts.key_heads, 2 * parts.key_heads, tokens)
    sizes, strides, half = (width, num_keys // 2, tokens), (head, head * num_keys), head * num_keys // 2
    query, key = builder.view(keys, sizes, strides), builder.view(keys, sizes, strides, half)
    value = builder.view(mixed, (width, heads, tokens), (head, token), 2 * head * parts.key_heads)
    beta, decay = _rates(builder, parts, given, tokens)
    answer = access.read(query, key, value, decay, beta, width, heads)
    answer = builder.reshape(norm_of(builder, answer, parts.norm), width * heads, tokens)
    return linear(builder, parts.output, builder.swiglu(gate, answer))


def _inputs(builder: Builder, parts: GatedLinear, given: int, tokens: int) -> tuple[int, int]:
    """Channels `[channels, tokens]` and gates `[width * heads, tokens]` of each token by itself."""
    made = linear(builder, parts.inputs, given)
    if parts.order is not None:
        heads = parts.order.numel()
        order = builder.constant(parts.order.repeat(tokens), heads, tokens, ggml_type=I32)
        made = builder.picked(builder.reshape(made, parts.head_dim, heads, tokens), order)
        made = builder.reshape(made, parts.head_dim * heads, tokens)
    if parts.gate is not None:
        return made, linear(builder, parts.gate, given)
    gates = parts.head_dim * parts.value_heads
    strides = (4 * (parts.channels + gates),)
    gate = builder.contiguous(builder.view(made, (gates, tokens), strides, 4 * parts.channels))
    return builder.view(made, (parts.channels, tokens), strides), gate


def _convolved(builder: Builder, parts: GatedLinear, latest: list[int]) -> int:
    """Each channel's sum over the latest tokens, weighted: tokens lie one behind the other, whole rows are added."""
    total = None
    for seen, factors in zip(latest, parts.kernel, strict=True):
        part = builder.times(seen, builder.constant(factors, parts.channels), in_place=False)
        total = part if total is None else builder.plus(total, part)
    assert total is not None, "a kernel sees at least the token itself"
    return builder.silu(total)


def _of_length_one(builder: Builder, values: int, width: int) -> int:
    return builder.scaled(builder.normalised(values, _EPSILON / width), width**-0.5)


def _rates(builder: Builder, parts: GatedLinear, given: int, tokens: int) -> tuple[int, int]:
    """How much of each head's state is written, and the logarithm of what stays: `[1, heads, tokens]`."""
    heads, run = parts.value_heads, parts.rates_run
    both = linear(builder, parts.rates, given)
    sizes, strides = (run, heads // run, tokens), (8 * run, 8 * heads)
    beta = builder.sigmoid(builder.view(both, sizes, strides), in_place=False)
    decay = builder.view(both, sizes, strides, 4 * run)
    decay = builder.plus(decay, builder.constant(parts.decay_bias, run, heads // run), in_place=False)
    decay = builder.times(builder.softplus(decay), builder.constant(parts.decay, run, heads // run))
    return builder.reshape(beta, 1, heads, tokens), builder.reshape(decay, 1, heads, tokens)
