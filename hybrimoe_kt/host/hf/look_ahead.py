"""Connects the model's routers to the runtime: this layer's scores, and the next layers' gates as predictors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_kt.device.inbox import Guesses
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.runtime import Runtime

__all__ = ["attach_look_ahead"]


def attach_look_ahead(model: nn.Module, runtime: Runtime) -> None:
    """Give the runtime every router's logits and, per MoE layer, a predictor made of the gates after it.

    A gate expects its own layer's normalised input; the one at hand was normalised for another layer. Both
    norms divide by the same root mean square, so multiplying by the ratio of their weights corrects it.
    """
    blocks = _moe_blocks(model)
    for layer, (gate, _) in blocks.items():
        gate.register_forward_hook(_noting(runtime, layer))
    layers = sorted(blocks)
    depth = runtime.options.prefetch_depth
    for place, layer in enumerate(layers):
        ahead = [(later, *blocks[later]) for later in layers[place + 1 : place + 1 + depth]]
        if ahead:
            runtime.look_ahead(layer, _Gates(blocks[layer][1], ahead))


def _noting(runtime: Runtime, layer: int) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if runtime.wants_scores:
            runtime.note_scores(layer, output[0])

    return note


def _moe_blocks(model: nn.Module) -> dict[int, tuple[nn.Module, torch.Tensor | None]]:
    """MoE layer -> (its gate, the weight of the norm in front of it)."""
    recorder = getattr(model.model, "_can_record_outputs", {}).get("router_logits")
    router = getattr(recorder, "target_class", None)
    found: dict[int, tuple[nn.Module, torch.Tensor | None]] = {}
    for number, layer in enumerate(model.model.layers):
        experts = next((module for module in layer.modules() if isinstance(module, HybriMoEExperts)), None)
        gate = next((module for module in layer.modules() if router and isinstance(module, router)), None)
        if experts is not None and gate is not None:
            norm = getattr(layer, "post_attention_layernorm", None)
            found[number] = (gate, getattr(norm, "weight", None))
    return found


class _Gates:
    """Predicts the routing of the following layers from the hidden states entering this one."""

    def __init__(self, norm: torch.Tensor | None, ahead: list[tuple[int, nn.Module, torch.Tensor | None]]) -> None:
        self._ahead = [(layer, gate, _ratio(norm, later)) for layer, gate, later in ahead]

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor) -> Guesses:
        chosen, scored = [], []
        for _, gate, ratio in self._ahead:
            weight = gate.weight
            corrected = hidden.to(device=weight.device, dtype=weight.dtype)
            # `forward`, not a call: the hook that notes scores must not take a prediction for the real thing
            logits, _, ids = gate.forward(corrected if ratio is None else corrected * ratio)
            chosen.append(ids)
            scored.append(logits)
        scores = torch.softmax(torch.stack(scored).float(), dim=-1).mean(dim=1)
        return Guesses([layer for layer, _, _ in self._ahead], torch.stack(chosen), scores)


def _ratio(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> torch.Tensor | None:
    if ours is None or theirs is None or bool((ours == 0).any()):
        return None
    return (theirs.float() / ours.float()).detach().to(theirs.dtype)
