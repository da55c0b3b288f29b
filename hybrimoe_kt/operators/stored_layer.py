"""Keys and values that graphs own, as a layer of Transformers' cache: long prompts are its own modules'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from hybrimoe_kt.backends.ggml.key_values import KeyValues
from hybrimoe_kt.quants import row_bytes

__all__ = ["KeyLayout", "StoredLayer"]


@dataclass(frozen=True, slots=True, eq=False)
class KeyLayout:
    """How Transformers' attention has keys and values, and how graphs do."""

    kv_heads: int
    rank: int = 0
    """Of latent attention, whose keys are latents and whose values are the rotated part; 0 for any other."""
    order: torch.Tensor | None = None
    """Where each rotated dimension of a stored key is in Transformers', int64; the rest follows. None: the same."""

    def to_stored(self, keys: torch.Tensor) -> torch.Tensor:
        """Reorder `[..., width]`."""
        return keys if self.order is None else keys[..., self.order]

    def to_stock(self, keys: torch.Tensor) -> torch.Tensor:
        """Undo `to_stored`."""
        return keys if self.order is None else keys[..., self.order.argsort()]


class StoredLayer(DynamicLayer):
    """One conversation's keys and values of one layer; a batch of one."""

    keeps_every_token = True
    """Whether something is held of each, so that the first ones' can be read alone."""

    def __init__(self, held: KeyValues, layout: KeyLayout) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.layout = held, layout
        self.is_initialized = True

    @torch.no_grad()
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take `[1, heads, tokens, width]` each and return all of them, in the same dtype."""
        layout, held, dtype = self.layout, self.held, key_states.dtype
        if layout.rank:
            latents, turned = key_states[0, 0].float(), layout.to_stored(value_states[0, 0].float())
            held.append(torch.cat((latents, turned), dim=1), latents)
            latents, turned = held.read_keys().tensor_split([layout.rank], dim=1)
            return latents[None, None].to(dtype), layout.to_stock(turned)[None, None].to(dtype)
        keys, values = (_rows(states.float()) for states in (layout.to_stored(key_states), value_states))
        held.append(keys, values)
        keys = held.read_keys().view(held.length, layout.kv_heads, -1).transpose(0, 1)
        values = held.read_values().reshape(layout.kv_heads, -1, held.length).transpose(1, 2)
        return layout.to_stock(keys)[None].to(dtype), values[None].to(dtype)

    def read_states(self, length: int) -> tuple[torch.Tensor, ...]:
        """What is held of the first `length` tokens, as it is kept, in its memory."""
        held = self.held
        values = held.values.memory[:, :length] if held.is_transposed else held.values.memory[:length]
        return held.keys.memory[:length], values

    def write_states(self, states: tuple[torch.Tensor, ...], length: int) -> None:
        """Hold a copy of what another layer of this kind has read, and nothing else."""
        held = self.held
        held.crop(0)
        held.reserve(length)
        keys, values = states
        held.keys.memory[:length] = keys
        if held.is_transposed:
            held.values.memory[:, :length] = values
        else:
            held.values.memory[:length] = values
        held.advance(length)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self.held.num_bytes

    @property
    def token_bytes(self) -> int:
        """Memory that one token takes."""
        widths = self.held.key_width, self.held.value_width
        return sum(row_bytes(self.held.ggml_type, width) for width in widths)

    def get_seq_length(self) -> int:
        return self.held.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.held.crop(self.held.length + min(0, tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.held.crop(0)


def _rows(states: torch.Tensor) -> torch.Tensor:
    """`[1, heads, tokens, width]` -> `[tokens, heads * width]`."""
    return states[0].transpose(0, 1).flatten(1)
