"""The network that is trained: Qwen3-MoE as Transformers and llama.cpp compute it, written for speed on a few cores."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .experts import RoutedExperts


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; names as in Transformers' Qwen3MoeConfig where it has them."""

    num_layers: int = 5
    num_experts: int = 32
    top_k: int = 2
    hidden_size: int = 256
    expert_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 4096
    context: int = 1024
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim] of the half-rotation RoPE that Qwen uses."""
    frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, heads, T, head_dim] turned by its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.qkv = nn.Linear(shape.hidden_size, width + 2 * kv_width, bias=False)
        self.out = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.rms_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s, (batch, length, _) = self.shape, x.shape
        width, kv_width = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
        q, k, v = self.qkv(x).split((width, kv_width, kv_width), dim=-1)
        q = self.q_norm(q.view(batch, length, s.num_heads, s.head_dim)).transpose(1, 2)
        k = self.k_norm(k.view(batch, length, s.num_kv_heads, s.head_dim)).transpose(1, 2)
        v = v.view(batch, length, s.num_kv_heads, s.head_dim).transpose(1, 2)
        group = s.num_heads // s.num_kv_heads
        k, v = (
            t[:, :, None].expand(-1, -1, group, -1, -1).reshape(batch, s.num_heads, length, s.head_dim)
            for t in (rotate(k, cos, sin), v)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class MoE(nn.Module):
    """Softmax router, top-k with renormalised weights, SwiGLU experts; keeps the last call's auxiliary losses."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(shape.num_experts, 2 * shape.expert_size, shape.hidden_size))
        self.down = nn.Parameter(torch.empty(shape.num_experts, shape.hidden_size, shape.expert_size))
        self.balance = self.z = torch.zeros(())
        self.load = torch.zeros(shape.num_experts)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        scores = logits.softmax(-1)
        weights, ids = scores.topk(self.shape.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        self.load = torch.bincount(ids.flatten(), minlength=self.shape.num_experts) / ids.numel()
        # 1 where both the choices and the scores are spread evenly (Switch Transformers, eq. 4).
        self.balance = self.shape.num_experts * (self.load * scores.mean(0)).sum()
        self.z = logits.logsumexp(-1).square().mean()
        return RoutedExperts.apply(rows, ids, weights, self.gate_up, self.down).view_as(x)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_eps)
        self.attention = Attention(shape)
        self.moe_norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_eps)
        self.moe = MoE(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.moe(self.moe_norm(x))


class Model(nn.Module):
    """Decoder with tied embeddings; ``forward`` gives logits [B, T, vocab]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_eps)
        self._initialise()

    def _initialise(self) -> None:
        deep = (2 * self.shape.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            fan_in = parameter.shape[-1]
            scale = 0.02 if "embedding" in name or "router" in name else fan_in**-0.5
            if name.endswith(("out.weight", "down")):
                scale *= deep
            nn.init.normal_(parameter, std=scale)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = rope_tables(self.shape, tokens.shape[1])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)

    def auxiliary_losses(self) -> tuple[Tensor, Tensor]:
        """Mean over layers of the load-balancing and the z loss of the last forward pass."""
        moes = [block.moe for block in self.blocks]
        return torch.stack([m.balance for m in moes]).mean(), torch.stack([m.z for m in moes]).mean()
