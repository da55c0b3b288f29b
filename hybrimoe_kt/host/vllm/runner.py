"""What is changed of vLLM's MoE layers once they stand: who hears the router, and what a graph is cut at.

Where a graph is captured in pieces a layer of ours lies between two: an eager piece has to write where the piece behind
it reads, which is memory of the piece before it. vLLM's own operator answers in new memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.runner.moe_runner import (
    _layer_name_type,
    _resolve_layer_name,
    get_layer_from_name,
)
from vllm.utils.torch_utils import direct_register_custom_op

from hybrimoe_kt.host.engines.experts import EngineExperts
from hybrimoe_kt.host.engines.gates import EngineGate

from .names import OP

__all__ = ["attach", "gate_of", "watch_pipeline"]


def attach(runner: Any, experts: EngineExperts) -> None:
    """Let a layer's router be heard, and its work be one operator that writes into memory it is given."""
    runner.routed_experts.quant_method.experts = experts
    runner.router = _HeardRouter(runner.router, experts)
    runner._forward_entry = _Entry(runner)


def watch_pipeline(model: torch.nn.Module, experts: EngineExperts) -> None:
    """Let a rank that is not the first of its pipeline know a lost step by what it is handed, and compute with zeros.

    Else its attention would write NaN where later requests' keys and values go, and those would not get rid of it.
    """

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        handed = kwargs.get("intermediate_tensors")
        if handed is None:
            return
        tensors = [value for value in handed.tensors.values() if value.is_floating_point()]
        if all(math.isfinite(value.sum().item()) or value.isfinite().all() for value in tensors):
            return
        experts.lose_step()
        for value in tensors:
            value.zero_()

    model.register_forward_pre_hook(look, with_kwargs=True)


def gate_of(runner: Any, layer: int, block: Any, norm: torch.Tensor | None) -> EngineGate | None:
    """The layer's router for looking ahead; None where neither the layer nor the block around it shows one."""
    named = (getattr(block, name, None) for name in ("gate", "router"))
    gate = runner.gate if runner.gate is not None else next((found for found in named if callable(found)), None)
    if gate is None or runner._fse_fuse_gate:
        return None
    router = runner.router

    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = gate(hidden)
        logits = answer[0] if isinstance(answer, tuple) else answer
        return logits, router.select_experts(hidden_states=hidden, router_logits=logits)[1]

    return EngineGate(layer, route, norm, runner.routed_experts.expert_map)


class _HeardRouter:
    """A layer's router, whose logits are noted for whoever learns from them."""

    def __init__(self, router: Any, experts: EngineExperts) -> None:
        self.__dict__.update(_router=router, _experts=experts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_router"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._router, name, value)

    def select_experts(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **rest: Any) -> Any:
        if self._experts.wants_logits:
            self._experts.note_logits(router_logits)
        return self._router.select_experts(hidden_states, router_logits, *args, **rest)


class _Entry:
    """In place of a runner's `_forward_entry`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __call__(
        self, hidden: Any, logits: Any, shared_input: Any, input_ids: Any, layer_name: Any, unpadded: int
    ) -> Any:
        runner = self._runner
        if not torch.compiler.is_compiling():
            return runner._forward_impl(hidden, logits, shared_input, input_ids)
        out, has_shared = torch.empty_like(hidden), runner._shared_experts is not None
        shared = torch.empty_like(hidden if shared_input is None else shared_input) if has_shared else out.new_empty(0)
        getattr(torch.ops.vllm, OP)(hidden, logits, shared_input, input_ids, out, shared, layer_name)
        return (shared, out) if has_shared else out


def _experts(
    hidden: torch.Tensor,
    logits: torch.Tensor,
    shared_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    out: torch.Tensor,
    shared: torch.Tensor,
    layer_name: _layer_name_type,
) -> None:
    runner: Any = get_layer_from_name(_resolve_layer_name(layer_name))
    answer = runner._forward_impl(hidden, logits, shared_input, input_ids)
    if isinstance(answer, tuple):
        shared.copy_(answer[0])
        answer = answer[1]
    out.copy_(answer)


def _experts_fake(
    hidden: torch.Tensor,
    logits: torch.Tensor,
    shared_input: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    out: torch.Tensor,
    shared: torch.Tensor,
    layer_name: _layer_name_type,
) -> None:
    return None


if not hasattr(torch.ops.vllm, OP):
    direct_register_custom_op(op_name=OP, op_func=_experts, mutates_args=["out", "shared"], fake_impl=_experts_fake)
