"""What `cache_size: auto` may take of a card that vLLM divides."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from hybrimoe_kt.host.engines.limits import CardUse, auto_cache_bytes

__all__ = ["auto_bytes"]

_STEP_BYTES_A_VALUE = 24
"""Taken by a step for each hidden value of its longest batch; an estimate, vLLM measures it after experts are there."""


def auto_bytes(config: Any) -> int | None:
    """Bytes on this rank's card; None where there is none."""
    if not current_platform.is_cuda_alike() and not current_platform.is_xpu():
        return None
    free, total = torch.accelerator.get_memory_info()
    model, scheduler = config.model_config, config.scheduler_config
    card = CardUse(
        total=total,
        used=total - free,
        utilization=config.cache_config.gpu_memory_utilization,
        step=_STEP_BYTES_A_VALUE * scheduler.max_num_batched_tokens * model.get_hidden_size(),
        kv_per_request=_kept_of_one(config),
        max_requests=scheduler.max_num_seqs,
        kv_given=config.cache_config.kv_cache_memory_bytes,
    )
    return auto_cache_bytes(card)


def _kept_of_one(config: Any) -> int:
    """Bytes that this rank's layers keep of a request of full length, by what each says of itself."""
    total = 0
    for layer in config.compilation_config.static_forward_context.values():
        spec = layer.get_kv_cache_spec(config) if hasattr(layer, "get_kv_cache_spec") else None
        if spec is not None:
            total += spec.max_memory_usage_bytes(config)
    return total
