"""Attention with sinks by torch's fused kernels, for models whose own code would hold every score in memory.

A sink is a logit per head that takes its share of the softmax and adds nothing. It is the same as one more key, which
the queries meet in one more dimension that no other key has, and a value of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

__all__ = ["attend_with_sinks", "implementation_for"]

_NAME = "hybrimoe_sinks"
_WIDTH_STEP = 8
"""Widths that torch's fused kernels take are multiples of this."""


def implementation_for(model: type[PreTrainedModel]) -> str:
    """What Transformers is told attends in models of this class: "sdpa", or ours where that is not supported."""
    if getattr(model, "_supports_sdpa", False):
        return "sdpa"
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, _mask)
    return _NAME


def attend_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """`query [batch, heads, tokens, width]`, keys and values `[batch, kv_heads, length, width]` -> as `query`.

    `mask` bool, or float to be added, `[batch, 1, tokens, length]`; None: all is seen. `sinks [heads]`.
    """
    batch, heads, tokens, width = query.shape
    more = _WIDTH_STEP - width % _WIDTH_STEP
    meeting = functional.pad((sinks.to(query.dtype) / scaling).view(1, heads, 1, 1), (0, more - 1))
    query = torch.cat((query, meeting.expand(batch, heads, tokens, more)), dim=-1)
    keys = functional.pad(key, (0, more, 0, 1))
    keys[..., -1, width] = 1.0
    values = functional.pad(value, (0, width + more - value.shape[-1], 0, 1))
    if mask is not None:
        mask = functional.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)
    groups = heads // key.shape[1]
    answer = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=groups > 1
    )
    return answer[..., : value.shape[-1]]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers calls it; the mask says all there is to say of windows."""
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is None:  # layers without, in models whose others have sinks
        answer = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=factor, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        answer = attend_with_sinks(query, key, value, attention_mask, factor, s_aux)
    return answer.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """torch's mask, never left out: the sink's place in it is not what its causal kernels have there."""
    mask: torch.Tensor | None = sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))
    return mask
