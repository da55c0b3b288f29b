"""Connects the model's routers to the runtime: this layer's scores, and the next layers' gates as predictors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.device.inbox import Guesses
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.runtime import Runtime

from .architectures import Architecture

__all__ = ["attach_look_ahead", "look_ahead"]


def attach_look_ahead(model: nn.Module, runtime: Runtime, family: Architecture) -> None:
    """Give the runtime every router's logits and, per MoE layer, a predictor made of the gates after it."""
    for layer, block in _moe_blocks(model, family).items():
        block.gate.register_forward_hook(_noting(runtime, layer))
    look_ahead(model, runtime, family, runtime.options.prefetch_depth)


def look_ahead(model: nn.Module, runtime: Runtime, family: Architecture, depth: int) -> None:
    """Ask the gates of `depth` layers after each MoE layer from now on.

    A gate expects its own layer's normalised input; the one at hand was normalised for another layer. Both
    norms divide by the same root mean square, so multiplying by the ratio of their factors corrects it.
    """
    blocks = _moe_blocks(model, family)
    layers = sorted(blocks)
    for place, layer in enumerate(layers):
        ahead = [(later, blocks[later]) for later in layers[place + 1 : place + 1 + depth]]
        if ahead:
            device = runtime.device_of(layer) or blocks[layer].gate.weight.device
            runtime.look_ahead(layer, _Gates(device, blocks[layer], ahead))


@dataclass(frozen=True, slots=True)
class _Block:
    """A MoE layer's gate, the factor of the norm in front of it, and the gate's further arguments."""

    gate: nn.Module
    norm: torch.Tensor | None
    inputs: tuple[Any, ...]


def _noting(runtime: Runtime, layer: int) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if runtime.wants_scores:
            runtime.note_scores(layer, output[0])

    return note


def _moe_blocks(model: nn.Module, family: Architecture) -> dict[int, _Block]:
    """Return the MoE layers by number."""
    recorder = getattr(model.model, "_can_record_outputs", {}).get("router_logits")
    router = getattr(recorder, "target_class", None)
    found: dict[int, _Block] = {}
    for number, layer in enumerate(model.model.layers):
        experts = next((module for module in layer.modules() if isinstance(module, HybriMoEExperts)), None)
        gate = next((module for module in layer.modules() if router and isinstance(module, router)), None)
        if experts is not None and gate is not None:
            norm = getattr(layer, "post_attention_layernorm", None)
            owner = next(module for module in layer.modules() if gate in module.children())
            inputs = tuple(getattr(owner, name) for name in family.router_inputs)
            found[number] = _Block(gate, _factor(norm, family.norm_offset), inputs)
    return found


def _factor(norm: nn.Module | None, offset: float) -> torch.Tensor | None:
    weight: torch.Tensor | None = getattr(norm, "weight", None)
    return None if weight is None else weight + offset


class _Gates:
    """Predicts the routing of the following layers from the hidden states entering this one."""

    def __init__(self, device: torch.device, here: _Block, ahead: list[tuple[int, _Block]]) -> None:
        near = [(layer, _brought(block, device)) for layer, block in ahead]
        norm = _brought(here, device).norm
        self._ahead = [(layer, block, _ratio(norm, block.norm)) for layer, block in near]

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> Guesses:
        chosen, scored = [], []
        for _, block, ratio in self._ahead:
            weight = block.gate.weight
            corrected = hidden.to(weight.dtype)
            # `forward`, not a call: the hook that notes scores must not take a prediction for the real thing
            logits, _, ids = block.gate.forward(corrected if ratio is None else corrected * ratio, *block.inputs)
            chosen.append(ids)
            scored.append(logits)
        scores = torch.softmax(torch.stack(scored).float(), dim=-1).mean(dim=1)
        return Guesses([layer for layer, _, _ in self._ahead], torch.stack(chosen), scores)


def _brought(block: _Block, device: torch.device) -> _Block:
    """The block itself, or a copy on `device` where its layer stands on another."""
    if block.gate.weight.device == device:
        return block
    norm = None if block.norm is None else block.norm.to(device)
    inputs = tuple(value.to(device) if isinstance(value, torch.Tensor) else value for value in block.inputs)
    return _Block(copy.deepcopy(block.gate).to(device), norm, inputs)


def _ratio(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> torch.Tensor | None:
    if ours is None or theirs is None or bool((ours == 0).any()):
        return None
    return (theirs.float() / ours.float()).detach().to(theirs.dtype)
