"""Connects the model's routers to the runtime: this layer's scores, and the next layers' gates as predictors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.runtime import Runtime

from .architectures import Architecture
from .gates import Gate, GateRow, logits_and_ids

__all__ = ["look_ahead", "moe_gates", "note_routers"]


def note_routers(model: nn.Module, family: Architecture) -> None:
    """Give every layer's experts their router's logits from now on."""
    for experts, gate in moe_gates(model, family).values():
        gate.module.register_forward_hook(_noting(experts, gate))


def look_ahead(model: nn.Module, runtime: Runtime, family: Architecture, depth: int) -> None:
    """Ask the gates of `depth` layers after each MoE layer from now on.

    A gate expects its own layer's normalised input; the one at hand was normalised for another layer. Both
    norms divide by the same root mean square, so multiplying by the ratio of their factors corrects it. What enters
    experts of another width than the gates' says nothing to them.
    """
    blocks = {layer: gate for layer, (_, gate) in moe_gates(model, family).items()}
    layers = sorted(blocks)
    rows: dict[torch.device, GateRow] = {}
    for place, layer in enumerate(layers):
        ahead = slice(place + 1, place + 1 + depth)
        if layers[ahead] and runtime.store.layers[layer].hidden == blocks[layer].weight.shape[1]:
            device = runtime.device_of(layer) or blocks[layer].weight.device
            if device not in rows:
                rows[device] = GateRow([blocks[number] for number in layers], device)
            runtime.look_ahead(layer, rows[device].predictor(place, layers, ahead))


def _noting(experts: HybriMoEExperts, gate: Gate) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if experts.runtime is not None and experts.runtime.wants_scores:
            logits = gate.logits_of(logits_and_ids(output)[0])
            experts.note_logits(logits, getattr(module, "probabilities", None))

    return note


def moe_gates(model: nn.Module, family: Architecture) -> dict[int, tuple[HybriMoEExperts, Gate]]:
    """Return the experts and the router of every MoE layer by its number."""
    body: Any = model.model
    recorder = getattr(body, "_can_record_outputs", {}).get("router_logits")
    router = getattr(recorder, "target_class", None)
    found: dict[int, tuple[HybriMoEExperts, Gate]] = {}
    for number, layer in enumerate(body.layers):
        experts = next((module for module in layer.modules() if isinstance(module, HybriMoEExperts)), None)
        gate = next((module for module in layer.modules() if router and isinstance(module, router)), None)
        if experts is not None and gate is not None:
            norm = getattr(layer, family.expert_norm, None)
            owner = next(module for module in layer.modules() if gate in module.children())
            inputs = tuple(getattr(owner, name, None) for name in family.router_inputs)
            found[number] = (
                experts,
                Gate(
                    gate,
                    _factor(norm, family.norm_offset),
                    inputs,
                    family.routes_texts,
                    family.router_normalises,
                    family.router_gives_probabilities,
                ),
            )
    return found


def _factor(norm: nn.Module | None, offset: float) -> torch.Tensor | None:
    weight: torch.Tensor | None = getattr(norm, "weight", None)
    return None if weight is None else weight + offset
