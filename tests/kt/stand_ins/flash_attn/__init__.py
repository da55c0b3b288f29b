"""Stands in for the flash-attn package, which needs a GPU: the one function the framework calls here, in torch."""

import torch


def flash_attn_func(query, key, value, softmax_scale=None, causal=False):
    """`[batch, tokens, heads, dim]` each, all queries at the end of the keys -> the same shape."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(query, key, value, is_causal=causal, scale=softmax_scale).transpose(1, 2)


flash_attn_varlen_func = flash_attn_with_kvcache = None
