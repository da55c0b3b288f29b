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
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import direct_register_custom_op

from hybrimoe_kt.host.engines.experts import EngineExperts
from hybrimoe_kt.host.engines.gates import EngineGate

from .names import OP
from .steps import StepReader

__all__ = ["attach", "gate_of", "tell_lost_steps"]


def attach(runner: Any, experts: EngineExperts, reader: StepReader) -> None:
    """Let a layer's router be heard, and its work be one operator that writes into memory it is given."""
    method = runner.routed_experts.quant_method
    method.experts, method.reader = experts, reader
    _hear(runner.router, experts)
    runner._forward_entry = _Entry(runner)


def tell_lost_steps(model: torch.nn.Module, experts: EngineExperts | None) -> None:
    """Have a rank's answer to a lost step be NaN, and let it know one by what the rank before it in a pipeline answers.

    It then computes with zeros: its attention would write NaN where later requests' keys and values go, and those would
    not get rid of it. `experts` are None where a rank has none.
    """
    is_lost = False

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal is_lost
        handed, is_lost = kwargs.get("intermediate_tensors"), False
        if handed is None:
            return
        tensors = [value for value in handed.tensors.values() if value.is_floating_point()]
        if all(math.isfinite(value.sum().item()) or value.isfinite().all() for value in tensors):
            return
        is_lost = True
        for value in tensors:
            value.zero_()

    def tell(module: torch.nn.Module, args: Any, answer: Any) -> Any:
        has_failed = is_lost or (experts is not None and experts.take_failure() is not None)
        return _as_nan(answer) if has_failed else None

    model.register_forward_pre_hook(look, with_kwargs=True)
    model.register_forward_hook(tell)


def _as_nan(answer: Any) -> Any:
    if isinstance(answer, torch.Tensor):
        return torch.full_like(answer, float("nan")) if answer.is_floating_point() else answer
    if isinstance(answer, IntermediateTensors):
        return IntermediateTensors({name: _as_nan(value) for name, value in answer.items()})
    return type(answer)(_as_nan(each) for each in answer) if isinstance(answer, (tuple, list)) else answer


def gate_of(runner: Any, layer: int, block: Any, norm: torch.Tensor | None) -> EngineGate | None:
    """The layer's router for looking ahead; None where neither the layer nor the block around it shows one."""
    named = (getattr(block, name, None) for name in ("gate", "router"))
    gate = runner.gate if runner.gate is not None else next((found for found in named if callable(found)), None)
    choose = getattr(runner.router, "_compute_routing", None)  # `select_experts` would note it as what was routed
    if gate is None or choose is None or runner._fse_fuse_gate:
        return None

    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = gate(hidden)
        logits = answer[0] if isinstance(answer, tuple) else answer
        return logits, choose(hidden, logits, None)[1]

    return EngineGate(layer, route, norm, runner.routed_experts.expert_map)


def _hear(router: Any, experts: EngineExperts) -> None:
    """Note a layer's logits for whoever learns from them, on the router itself: vLLM asks what class it is of."""
    choose = router.select_experts

    def select_experts(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **rest: Any) -> Any:
        if experts.wants_logits:
            experts.note_logits(router_logits)
        return choose(hidden_states, router_logits, *args, **rest)

    router.select_experts = select_experts


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


def _writes_alone(*_: object) -> None:
    """What the operator is to who traces it."""


if not hasattr(torch.ops.vllm, OP):
    direct_register_custom_op(op_name=OP, op_func=_experts, mutates_args=["out", "shared"], fake_impl=_writes_alone)
