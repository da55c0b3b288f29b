"""What `cache_size: auto` may take of a card that vLLM divides."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from hybrimoe_kt.host.engines.limits import CardUse, auto_cache_bytes

__all__ = ["auto_bytes"]

_STEP_BYTES_A_VALUE = 24
"""Taken by a step for each hidden value of its longest batch; an estimate, vLLM measures it after experts are there."""


def auto_bytes(config: Any, model: torch.nn.Module) -> int | None:
    """Bytes on this rank's card; None where there is none."""
    if not current_platform.is_cuda_alike() and not current_platform.is_xpu():
        return None
    free, total = torch.accelerator.get_memory_info()
    model_config, scheduler = config.model_config, config.scheduler_config
    head = model_config.get_num_kv_heads(config.parallel_config) * model_config.get_head_size()
    per_layer = head * (1 if model_config.use_mla else 2) * torch.finfo(model_config.dtype).bits // 8
    card = CardUse(
        total=total,
        used=total - free,
        utilization=config.cache_config.gpu_memory_utilization,
        step=_STEP_BYTES_A_VALUE * scheduler.max_num_batched_tokens * model_config.get_hidden_size(),
        kv_per_token=per_layer * model_config.get_num_layers(config.parallel_config),
        max_model_len=model_config.max_model_len,
        max_requests=scheduler.max_num_seqs,
        kv_given=config.cache_config.kv_cache_memory_bytes,
    )
    return auto_cache_bytes(card)
