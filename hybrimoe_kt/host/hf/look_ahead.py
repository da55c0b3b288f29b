"""Connects the model's routers to the runtime: this layer's scores, and the next layers' gates as predictors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.runtime.runtime import Runtime

from .architectures import Architecture
from .gates import Gate, GateRow, logits_and_ids

__all__ = ["attach_look_ahead", "look_ahead"]


def attach_look_ahead(model: nn.Module, runtime: Runtime, family: Architecture) -> None:
    """Give the runtime every router's logits and, per MoE layer, a predictor made of the gates after it."""
    for layer, gate in _moe_blocks(model, family).items():
        gate.module.register_forward_hook(_noting(runtime, layer))
    look_ahead(model, runtime, family, runtime.options.prefetch_depth)


def look_ahead(model: nn.Module, runtime: Runtime, family: Architecture, depth: int) -> None:
    """Ask the gates of `depth` layers after each MoE layer from now on.

    A gate expects its own layer's normalised input; the one at hand was normalised for another layer. Both
    norms divide by the same root mean square, so multiplying by the ratio of their factors corrects it.
    """
    blocks = _moe_blocks(model, family)
    layers = sorted(blocks)
    rows: dict[torch.device, GateRow] = {}
    for place, layer in enumerate(layers):
        ahead = slice(place + 1, place + 1 + depth)
        if layers[ahead]:
            device = runtime.device_of(layer) or blocks[layer].weight.device
            if device not in rows:
                rows[device] = GateRow([blocks[number] for number in layers], device)
            runtime.look_ahead(layer, rows[device].predictor(place, layers, ahead))


def _noting(runtime: Runtime, layer: int) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if runtime.wants_scores:
            runtime.note_scores(layer, logits_and_ids(output)[0])

    return note


def _moe_blocks(model: nn.Module, family: Architecture) -> dict[int, Gate]:
    """Return the MoE layers by number."""
    body: Any = model.model
    recorder = getattr(body, "_can_record_outputs", {}).get("router_logits")
    router = getattr(recorder, "target_class", None)
    found: dict[int, Gate] = {}
    for number, layer in enumerate(body.layers):
        experts = next((module for module in layer.modules() if isinstance(module, HybriMoEExperts)), None)
        gate = next((module for module in layer.modules() if router and isinstance(module, router)), None)
        if experts is not None and gate is not None:
            norm = getattr(layer, "post_attention_layernorm", None)
            owner = next(module for module in layer.modules() if gate in module.children())
            inputs = tuple(getattr(owner, name) for name in family.router_inputs)
            found[number] = Gate(gate, _factor(norm, family.norm_offset), inputs)
    return found


def _factor(norm: nn.Module | None, offset: float) -> torch.Tensor | None:
    weight: torch.Tensor | None = getattr(norm, "weight", None)
    return None if weight is None else weight + offset
