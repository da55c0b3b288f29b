"""MoE blocks for the legacy framework's rule files: in place of `KDeepseekV2MoE` and its likes.

They do what those do and hand the router's scores to the runtime, whose cache policies learn from them. The
framework's own blocks work with `HybriMoEExperts` too; scores are then missing and the policies do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.runtime import Job

from .experts import HybriMoEExperts
from .framework import BaseInjectedModule, refuse_capture
from .weights import layer_number

__all__ = ["HybriMoEDeepseekV2Block", "HybriMoEDeepseekV3Block", "HybriMoEMixtralBlock", "HybriMoEQwen2Block"]


class _Block(BaseInjectedModule):  # type: ignore[misc]
    """A MoE block: route, begin the routed experts, compute the shared ones beside them, add both.

    The blocks of a model know each other through its loader, so that one can ask the routers of the next what they
    will want, and the prefetcher can fetch it.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str = "cuda",
        generate_device: str = "cuda",
        **kwargs: Any,
    ) -> None:
        BaseInjectedModule.__init__(self, key, gguf_loader, config, orig_module, prefill_device, generate_device)
        if kwargs:
            raise ConfigError(
                f"{key}: {type(self).__name__} has no option {next(iter(kwargs))!r}; expert options belong to the rule "
                f"for HybriMoEExperts"
            )
        object.__setattr__(self, "layer", layer_number(key))
        object.__setattr__(self, "asked_ahead", False)
        object.__setattr__(self, "dtype", torch.bfloat16)  # of the hidden states, until one is seen
        vars(gguf_loader).setdefault("hybrimoe_blocks", {})[self.layer] = self

    def guess(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This layer's routing of `hidden [tokens, hidden]`: logits `[tokens, experts]`, ids `[tokens, top_k]`."""
        raise NotImplementedError

    def _begin(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, logits: torch.Tensor | None
    ) -> Job:
        """Start the routed experts: `hidden`, `ids`, `weights` `[tokens, ...]`; `logits [tokens, experts]` or None."""
        refuse_capture(type(self).__name__)
        object.__setattr__(self, "dtype", hidden.dtype)
        experts = self._hybrid_experts()
        if not self.asked_ahead:
            self._ask_ahead(experts)
        if logits is not None:
            experts.note_logits(logits)
        return experts.begin(hidden, ids, weights)

    def _finish(self, job: Job, hidden: torch.Tensor) -> torch.Tensor:
        """Their answer `[tokens, hidden]`, where `hidden` is."""
        answer: torch.Tensor = self.experts.finish(job)
        return answer.to(hidden.device)

    def _hybrid_experts(self) -> HybriMoEExperts:
        if not isinstance(self.experts, HybriMoEExperts):
            raise ConfigError(
                f"{self.key}: {type(self).__name__} works with HybriMoEExperts, found {type(self.experts).__name__}; "
                f"add a rule that replaces the experts by it"
            )
        return self.experts

    def _ask_ahead(self, experts: HybriMoEExperts) -> None:
        """Let the runtime ask the routers of the layers after this one, which the loader knows by now."""
        blocks: dict[int, _Block] = self.gguf_loader.hybrimoe_blocks
        depth = experts.runtime.options.prefetch_depth
        ahead = [blocks[layer] for layer in sorted(blocks) if layer > self.layer][:depth]

        if ahead:
            num_experts = experts.runtime.store.layers[ahead[0].layer].num_experts
            experts.runtime.look_ahead(self.layer, _Routers(ahead, num_experts, self.dtype))
        object.__setattr__(self, "asked_ahead", True)


class _Routers:
    """Asks the routers of some blocks, each in its own way; see `device.readback.Predict`."""

    def __init__(self, blocks: Sequence[_Block], num_experts: int, dtype: torch.dtype) -> None:
        self._blocks, self.num_experts, self._dtype = blocks, num_experts, dtype
        self.layers: Sequence[int] = [block.layer for block in blocks]

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        for place, block in enumerate(self._blocks):
            logits, chosen = block.guess(hidden.to(device=block.generate_device, dtype=self._dtype))
            ids[place].copy_(chosen)
            scores[place].copy_(torch.softmax(logits.float(), dim=-1).mean(dim=0))


class _DeepseekBlock(_Block):
    """The gate takes `[batch, tokens, hidden]`, returns ids and weights `[tokens, top_k]`, and keeps its logits."""

    def guess(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._logits(hidden), self.gate(hidden[None])[0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden.float(), self.gate.weight.float())

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        shape = hidden_states.shape
        ids, weights = self.gate(hidden_states)[:2]
        flat = hidden_states.view(-1, shape[-1])
        wanted = self._hybrid_experts().runtime.wants_scores  # computed again only where something learns from them
        job = self._begin(flat, ids, weights, self._logits(flat) if wanted else None)
        if self.config.n_shared_experts is None:
            return self._finish(job, flat).view(shape)
        shared: torch.Tensor = self.shared_experts(hidden_states)
        return self._finish(job, flat).view(shape) + shared


class HybriMoEDeepseekV2Block(_DeepseekBlock):
    """In place of `KDeepseekV2MoE`."""


class HybriMoEDeepseekV3Block(_DeepseekBlock):
    """In place of `KDeepseekV3MoE`."""


class _SoftmaxBlock(_Block):
    """The gate is a linear layer; the block itself takes the best of its softmax."""

    normalised = True

    def guess(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.gate(hidden)
        return logits, logits.topk(self.top_k, dim=-1).indices

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        shape = hidden_states.shape
        flat = hidden_states.view(-1, shape[-1])
        logits = self.gate(flat)
        weights, ids = torch.topk(functional.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        job = self._begin(flat, ids, weights.to(flat.dtype), logits)
        shared = self._shared(flat)
        return (self._finish(job, flat) + shared).view(shape), logits

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
        shared: torch.Tensor = functional.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return shared
