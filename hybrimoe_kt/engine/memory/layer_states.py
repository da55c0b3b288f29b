"""What one layer of a cache holds, as tensors: to copy a conversation, move it to the host, or go back in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.cache_utils import DummyLayer, LinearAttentionLayer

__all__ = ["LayerStates", "can_shorten", "states_of", "with_states"]


@runtime_checkable
class _TellsStates(Protocol):
    """What layers of our own are to a copy."""

    keeps_every_token: bool

    def read_states(self, length: int) -> tuple[torch.Tensor, ...]: ...

    def write_states(self, states: tuple[torch.Tensor, ...], length: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class LayerStates:
    """Of so many tokens. Tensors may be the layer's own memory, which goes on changing."""

    length: int
    tensors: tuple[torch.Tensor, ...]
    device: torch.device
    """Where the layer has them; the tensors may have been moved to the host."""
    names: tuple[tuple[str, int], ...] = ()
    """Of linear attention's states: what each is, and its number in the layer."""

    @property
    def num_bytes(self) -> int:
        """Of the tensors, had they memory of their own."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @torch.inference_mode()
    def copied(self, device: str | None = None) -> LayerStates:
        """The same in memory of its own, on `device` where that is given; page-locked where it comes from a GPU."""
        return replace(self, tensors=tuple(_copied(tensor, device) for tensor in self.tensors))


def _copied(tensor: torch.Tensor, device: str | None) -> torch.Tensor:
    if device != "cpu" or tensor.device.type == "cpu":
        return tensor.to(device or tensor.device, copy=True)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor)


def can_shorten(layer: Any) -> bool:
    """Whether a layer keeps something of every token, so that the first ones' can be had; or nothing at all."""
    if isinstance(layer, DummyLayer):
        return True
    return isinstance(layer, _TellsStates) and layer.keeps_every_token


def states_of(layer: Any, length: int) -> LayerStates | None:
    """What a layer holds of its first `length` tokens, of all where it cannot be shortened; None: not known here."""
    if isinstance(layer, _TellsStates):
        return _of(length, layer.read_states(length))
    if isinstance(layer, DummyLayer):
        return _of(length, ())
    if type(layer) is LinearAttentionLayer:
        found = {(kind, at): one for kind in _KINDS for at, one in getattr(layer, kind).items() if one is not None}
        return _of(length, tuple(found.values()), tuple(found))
    return None


_KINDS = "conv_states", "recurrent_states"


def _of(length: int, tensors: tuple[torch.Tensor, ...], names: tuple[tuple[str, int], ...] = ()) -> LayerStates:
    return LayerStates(length, tensors, tensors[0].device if tensors else torch.device("cpu"), names)


@torch.inference_mode()
def with_states(layer: Any, states: LayerStates) -> None:
    """Have a layer hold a copy of `states` and nothing else."""
    tensors = tuple(tensor.to(states.device) for tensor in states.tensors)
    if isinstance(layer, _TellsStates):
        layer.write_states(tensors, states.length)
        return
    if isinstance(layer, DummyLayer):
        return
    assert type(layer) is LinearAttentionLayer, "no other layer's states are known"
    layer.reset()
    for (kind, at), tensor in zip(states.names, tensors, strict=True):
        held = getattr(layer, kind)
        if held[at] is None:
            conv, recurrent = (tensor if kind == one else None for one in _KINDS)
            layer.lazy_initialization(conv, recurrent, state_idx=at)
        held[at].copy_(tensor)  # in its own memory where there is some: captured steps read that
        layer.has_previous_state[at] = True
