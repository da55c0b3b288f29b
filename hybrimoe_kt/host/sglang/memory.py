"""What `cache_size: auto` may take of a card that SGLang divides."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.runtime_context import get_parallel, get_schedule

from hybrimoe_kt.host.engines.limits import CardUse, auto_cache_bytes

__all__ = ["auto_bytes"]


def auto_bytes(model_config: Any, device: torch.device) -> int | None:
    """Bytes on this rank's card; None where there is none."""
    if device.type == "cpu":
        return None
    free, total = torch.accelerator.get_memory_info()
    if model_config.attention_arch == AttentionArch.MLA:
        values = model_config.kv_lora_rank + model_config.qk_rope_head_dim
    else:
        values = 2 * model_config.get_num_kv_heads(get_parallel().attn_tp_size) * model_config.head_dim
    per_token = values * model_config.num_hidden_layers * torch.finfo(model_config.dtype).bits // 8
    kv_tokens = get_schedule().max_total_tokens
    card = CardUse(
        total=total,
        used=total - free,
        utilization=get_schedule().mem_fraction_static,
        step=0,  # what SGLang leaves of the card is for that
        kv_per_request=per_token * model_config.context_len,
        max_requests=get_schedule().max_running_requests or 1,
        kv_given=None if kv_tokens is None else kv_tokens * per_token,
    )
    return auto_cache_bytes(card)
