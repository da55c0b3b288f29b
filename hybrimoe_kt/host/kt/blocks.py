"""MoE blocks for the legacy framework's rule files: in place of `KDeepseekV2MoE` and its likes.

They do what those do and hand the router's scores to the runtime, whose cache policies learn from them. The
framework's own blocks work with `HybriMoEExperts` too; scores are then missing and the policies do without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from hybrimoe_kt.errors import ConfigError

from .experts import HybriMoEExperts
from .framework import BaseInjectedModule, refuse_capture

__all__ = ["HybriMoEDeepseekV2Block", "HybriMoEDeepseekV3Block", "HybriMoEMixtralBlock", "HybriMoEQwen2Block"]


class _Block(BaseInjectedModule):  # type: ignore[misc]
    """A MoE block: route, compute the routed experts, add the shared ones."""

    def _routed(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        """`hidden`, `ids`, `weights` `[tokens, ...]`; `logits [tokens, experts]` or None -> `[tokens, hidden]`."""
        refuse_capture(type(self).__name__)
        experts = self._hybrid_experts()
        if logits is not None:
            experts.runtime.note_scores(experts.layer, logits)
        return experts(hidden, ids, weights).to(hidden.device)

    def _hybrid_experts(self) -> HybriMoEExperts:
        if not isinstance(self.experts, HybriMoEExperts):
            raise ConfigError(
                f"{self.key}: {type(self).__name__} works with HybriMoEExperts, found {type(self.experts).__name__}; "
                f"add a rule that replaces the experts by it"
            )
        return self.experts

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The logits of a gate that keeps them to itself, computed again where anything learns from them."""
        if not self._hybrid_experts().runtime.wants_scores:
            return None
        return functional.linear(hidden.float(), self.gate.weight.float())


class _DeepseekBlock(_Block):
    """The gate returns expert ids and final weights `[tokens, top_k]` first."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        shape = hidden_states.shape
        ids, weights = self.gate(hidden_states)[:2]
        flat = hidden_states.view(-1, shape[-1])
        routed = self._routed(flat, ids, weights, self._scores(flat)).view(shape)
        if self.config.n_shared_experts is None:
            return routed
        return routed + self.shared_experts(hidden_states)


class HybriMoEDeepseekV2Block(_DeepseekBlock):
    """In place of `KDeepseekV2MoE`."""


class HybriMoEDeepseekV3Block(_DeepseekBlock):
    """In place of `KDeepseekV3MoE`."""


class _SoftmaxBlock(_Block):
    """The gate is a linear layer; the block itself takes the best of its softmax."""

    normalised = True

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape = hidden_states.shape
        flat = hidden_states.view(-1, shape[-1])
        logits = self.gate(flat)
        weights, ids = torch.topk(functional.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        routed = self._routed(flat, ids, weights.to(flat.dtype), logits)
        return (routed + self._shared(flat)).view(shape), logits

    def _shared(self, flat: torch.Tensor) -> torch.Tensor | float:
        return 0.0


class HybriMoEMixtralBlock(_SoftmaxBlock):
    """In place of `KMistralSparseMoEBlock`."""


class HybriMoEQwen2Block(_SoftmaxBlock):
    """In place of `KQwen2MoeSparseMoeBlock`."""

    @property
    def normalised(self) -> bool:  # type: ignore[override]
        return bool(self.norm_topk_prob)

    def _shared(self, flat: torch.Tensor) -> torch.Tensor:
        return functional.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
