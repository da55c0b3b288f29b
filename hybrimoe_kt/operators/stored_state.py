"""What linear attention keeps in a graph's memory, as a layer of Transformers' cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from hybrimoe_kt.backends.ggml.recurrent_state import RecurrentState

__all__ = ["StateLayout", "StoredState"]


@dataclass(frozen=True, slots=True, eq=False)
class StateLayout:
    """Where what Transformers' attention has is stored, int64; None: in the same order."""

    heads: torch.Tensor | None = None
    channels: torch.Tensor | None = None


class StoredState(LinearAttentionLayer):
    """One conversation's state of one layer; a batch of one.

    Columns are never given away: modules that got them would write them, in an order of their own. Recording the past,
    as this layer says it does, makes every version of Transformers leave that to `update_conv_state`.
    """

    keeps_every_token = False
    """Whether something is held of each, so that the first ones' can be read alone."""

    def __init__(self, held: RecurrentState, layout: StateLayout) -> None:
        self.held, self.layout = held, layout
        super().__init__()
        self.record_past = True

    def read_states(self, length: int) -> tuple[torch.Tensor, ...]:
        """What is held of all tokens, in its memory; there is nothing of the first `length` alone."""
        return self.held.matrices, self.held.kept

    def write_states(self, states: tuple[torch.Tensor, ...], length: int) -> None:
        """Hold a copy of what another layer of this kind has read of `length` tokens, and nothing else."""
        held, (matrices, kept) = self.held, states
        held.clear()
        held.matrices.copy_(matrices)
        held.kept.copy_(kept)
        held.length = length

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self.held.num_bytes

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """Whether there is a token before the next one."""
        return {0: self.held.length > 0}

    @has_previous_state.setter
    def has_previous_state(self, _: object) -> None:
        """Nothing: the constructor says that there is none."""

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        """The state `[1, heads, keys, values]`."""
        matrices, heads = self.held.matrices, self.layout.heads
        return {0: (matrices if heads is None else matrices[heads]).transpose(1, 2)[None]}

    @recurrent_states.setter
    def recurrent_states(self, _: object) -> None:
        """Nothing, as above."""

    @property
    def is_croppable(self) -> bool:
        """One state is kept, not one a token."""
        return False

    @torch.no_grad()
    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take more tokens' columns `[1, channels, tokens]`; return them behind those that were kept."""
        order = self.layout.channels
        before = self.held.kept if order is None else self.held.kept[:, order]
        whole = torch.cat((before.t()[None].to(conv_states.dtype), conv_states), dim=-1)
        columns = conv_states[0].t().float()
        self.held.append(columns if order is None else columns[:, order.argsort()])
        return whole

    @torch.no_grad()
    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take the state after the tokens of `update_conv_state`."""
        states, heads = recurrent_states[0].transpose(1, 2), self.layout.heads
        self.held.matrices[slice(None) if heads is None else heads] = states.float()
        return recurrent_states

    def reset(self) -> None:
        """Forget all tokens; the memory stays for the next conversation."""
        self.held.clear()
