"""Stands in for `ktransformers.operators.triton_attention`: one step of latent attention over pages, in torch."""

import torch


def decode_attention_fwd_grouped(
    q, k_buffer, v_buffer, o, req_to_token, b_seq_len, attn_logits, num_kv_splits, sm_scale, page_size, logit_cap=0.0
):
    """Write `softmax(q k^T) v` of every sequence into `o [batch, 1, heads, rank]`; pages hold one key head."""
    for sequence, length in enumerate(b_seq_len.tolist()):
        pages = req_to_token[sequence].long()
        keys, values = (buffer[pages].flatten(0, 1)[:length, 0].float() for buffer in (k_buffer, v_buffer))
        scores = q[sequence].float() @ keys.T * sm_scale
        o[sequence].copy_(torch.softmax(scores, dim=-1) @ values)
