"""Routed experts for training on a CPU: pairs sorted by expert, one matrix product an expert, own backward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutedExperts(torch.autograd.Function):
    """Weighted sum of the chosen experts' SwiGLU outputs.

    ``x`` [T, H], ``ids`` [T, K] int64, ``weights`` [T, K], ``gate_up`` [E, 2F, H], ``down`` [E, H, F]; all float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        num_experts, top_k = gate_up.shape[0], ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        tokens = order // top_k
        ends = torch.bincount(ids.flatten(), minlength=num_experts).cumsum(0).tolist()
        rows = x[tokens]  # [T*K, H]
        hidden = torch.empty(rows.shape[0], gate_up.shape[1])
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(rows[start:end], gate_up[expert].t(), out=hidden[start:end])
        gate, up = hidden.chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate).mul_(up)  # [T*K, F]
        out = torch.empty_like(rows)
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(inner[start:end], down[expert].t(), out=out[start:end])
        pair_weights = weights.flatten()[order].unsqueeze(1)
        result = torch.zeros_like(x).index_add_(0, tokens, out * pair_weights)
        ctx.save_for_backward(rows, hidden, inner, out, pair_weights, order, tokens, gate_up, down)
        ctx.ends, ctx.shape = ends, weights.shape
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows, hidden, inner, out, pair_weights, order, tokens, gate_up, down = ctx.saved_tensors
        ends = ctx.ends
        grad_rows = grad[tokens]  # [T*K, H]
        grad_weights = torch.empty(ctx.shape).flatten()
        grad_weights[order] = (grad_rows * out).sum(1)
        grad_out = grad_rows.mul_(pair_weights)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        grad_inner = torch.empty_like(inner)
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(grad_out[start:end].t(), inner[start:end], out=grad_down[expert])
                torch.mm(grad_out[start:end], down[expert], out=grad_inner[start:end])
            else:
                grad_down[expert].zero_(), grad_gate_up[expert].zero_()
        gate, up = hidden.chunk(2, dim=1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_hidden = torch.empty_like(hidden)
        torch.mul(grad_inner, silu, out=grad_hidden[:, gate.shape[1] :])
        slope = sigmoid.add_(silu.mul_(1 - sigmoid))
        torch.mul(grad_inner.mul_(up), slope, out=grad_hidden[:, : gate.shape[1]])
        grad_x_rows = torch.empty_like(rows)
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if end > start:
                torch.mm(grad_hidden[start:end].t(), rows[start:end], out=grad_gate_up[expert])
                torch.mm(grad_hidden[start:end], gate_up[expert], out=grad_x_rows[start:end])
        grad_x = torch.zeros_like(grad).index_add_(0, tokens, grad_x_rows)
        return grad_x, None, grad_weights.view(ctx.shape), grad_gate_up, grad_down
