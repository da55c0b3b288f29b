"""What a model and a machine must have for a device to plan tokens by itself."""

from __future__ import annotations

from hybrimoe_kt.device.executor import Executor

from .experts import ModelExperts

__all__ = ["refusal"]


def refusal(experts: ModelExperts, executor: Executor) -> str | None:
    """Why a device cannot plan this model's tokens, in a sentence's end; None where it can."""
    if not executor.lanes:
        return "no accelerator has slots"
    layers = executor.lanes[0].layers if len(executor.lanes) == 1 else ()
    if set(layers) != set(experts.store.layers):
        return "it must be one accelerator that serves every layer"
    lane = executor.lanes[0]
    if experts.is_share:
        return "other ranks have some of the experts"
    if not lane.accelerator.can_plan:
        return f"{lane.accelerator.name} runs no kernels of its own"
    if not lane.gpu.decides_on_device:
        return f"{lane.gpu.name} kernels are told by the host what to compute; give --gpu_backend triton"
    kinds = {(held.num_experts, held.top_k, held.hidden) for held in experts.store.layers.values()}
    if len(kinds) > 1:
        return "its layers differ in number of experts or width"
    _, top_k, _ = kinds.pop()
    for layer in layers:
        slots = lane.pool.layers.get(layer)
        if slots is None or len(slots.views) < top_k:
            return f"layer {layer} has fewer slots than a token has experts, {top_k}"
        if lane.accelerator.device.type != "cpu" and not experts.store.is_copied(layer):
            return f"layer {layer} has no page-locked copy; give --host_store page_locked"
    return None
