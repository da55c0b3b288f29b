"""`WeighedInputBlock`: Llama 4's MoE block, whose routing weights are of what enters experts, not of what leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.errors import ConfigError

from .adopted import Adopted

__all__ = ["WeighedInputBlock"]


class _TopOne(Adopted):
    """The stock router, which answers as other families' do: logits, weights `[num_tokens, 1]` and ids."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = functional.linear(hidden_states, self.weight)  # type: ignore[arg-type]
        best, ids = logits.topk(1, dim=-1)
        return logits, best.float().sigmoid().to(logits.dtype), ids


class WeighedInputBlock(nn.Module):
    """In place of a block of one expert a token: its input is weighed before the runtime gets it, with weights of one.

    The stock block runs every expert on every token, all but one on zeros, of which they make zeros. A host leaves
    dense layers as they are.
    """

    REPLACES = "Llama4TextMoe"

    router: Any
    experts: Any
    shared_expert: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
    ) -> None:
        super().__init__()
        if getattr(orig_module, "shared_expert", None) is None or getattr(orig_module, "router", None) is None:
            raise ConfigError(
                f"{key}: WeighedInputBlock replaces a MoE block with a router, found {type(orig_module).__name__}"
            )
        if (top_k := getattr(orig_module, "top_k", None)) != 1:
            raise ConfigError(
                f"{key}: WeighedInputBlock weighs what enters one expert a token, this model routes to {top_k}"
            )
        for name, child in orig_module.named_children():
            self.register_module(name, child)
        self.router = _TopOne(self.router)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[batch, tokens, hidden]` -> `[num_tokens, hidden]`, and the router's logits `[num_tokens, num_experts]`."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, weights, ids = self.router(flat)  # called, as a hook notes the logits
        job = self.experts.begin(flat * weights, ids, torch.ones_like(weights))
        shared: torch.Tensor = self.shared_expert(flat)
        return shared + self.experts.finish(job), logits
