"""`GgmlLayer`: a decoder layer whose dense piece is one graph of ggml's, where few tokens come at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.accelerators import is_host
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.choice import choose
from hybrimoe_kt.backends.ggml.dense_layer import DenseLayer, DenseMemory
from hybrimoe_kt.backends.ggml.pool import FEW_TOKENS
from hybrimoe_kt.backends.ggml.recurrent_state import RecurrentState
from hybrimoe_kt.backends.ggml.step_memory import DenseAnswer, StepMemory
from hybrimoe_kt.core.types import Phase
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.kv_cache_types import check_kv_cache_type

from .experts import HybriMoEExperts
from .stored_layer import KeyLayout, StoredLayer
from .stored_state import StateLayout, StoredState

__all__ = ["GgmlLayer"]

_LAYER = re.compile(r"\.layers\.(\d+)$")


class GgmlLayer(nn.Module):
    """In place of a decoder layer, on a CPU: adopts its modules and their names.

    The host tells it what it is made of, by `attach`; until then, for longer steps and where that is not known, it is
    what it replaces. What is kept of a conversation is the graphs' own in either case, see `cache_layer`.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str = "cpu",
        kv_cache_type: str = "f16",
        most_tokens: int = FEW_TOKENS,
    ) -> None:
        """`kv_cache_type` of keys and values: f16, f32 or q8_0; graphs compute steps of up to `most_tokens` tokens.

        0 of them leaves every step to the modules.
        """
        super().__init__()
        match = _LAYER.search(f".{key}")
        if match is None:
            raise ConfigError(f"{key}: GgmlLayer replaces a decoder layer (`...layers.N`)")
        self.check_kwargs({"kv_cache_type": kv_cache_type, "most_tokens": most_tokens})
        self.layer, self.kv_cache_type, self.most_tokens = int(match[1]), kv_cache_type, most_tokens
        self.may_be_ggml = is_host(generate_device) and ggml.unusable() is None
        """Whether it stands where ggml computes."""
        for name, child in orig_module.named_children():
            self.register_module(name, child)
        object.__setattr__(self, "_stock", orig_module)
        self._dense: DenseLayer | None = None
        self._layout: KeyLayout | StateLayout | None = None
        self._experts: list[HybriMoEExperts] = []
        self._router: list[tuple[nn.Module, tuple[Any, ...]]] = []

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kv_cache_type(kwargs.get("kv_cache_type", "f16"))
        most = kwargs.get("most_tokens", FEW_TOKENS)
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise ConfigError(f"most_tokens is {most!r}, valid: 0 or more")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_stock" not in self.__dict__:
                raise
            return getattr(self.stock, name)  # what a model reads of its layers beside their modules

    @property
    def stock(self) -> nn.Module:
        """The layer as Transformers built it, with operators in place of some of its modules."""
        found: nn.Module = self.__dict__["_stock"]
        return found

    @property
    def dense(self) -> DenseLayer | None:
        """Its dense piece, where ggml computes it."""
        return self._dense

    @property
    def memory(self) -> DenseMemory | None:
        """What it shares with the model's other layers."""
        return None if self._dense is None else self._dense.memory

    def attach(
        self,
        dense: DenseLayer,
        layout: KeyLayout | StateLayout,
        experts: HybriMoEExperts | None,
        router: tuple[nn.Module, tuple[Any, ...]] | None,
    ) -> None:
        """Compute by `dense` from now on; `router` and its further arguments choose where the graph does not.

        ConfigError where it cannot keep keys and values as this operator is to.
        """
        if reason := dense.refuses(self.kv_cache_type):
            raise ConfigError(f"layer {self.layer}: {reason}")
        self._dense, self._layout = dense, layout
        self._experts, self._router = [experts] if experts else [], [router] if router else []

    def cache_layer(self) -> StoredLayer | StoredState | None:
        """What Transformers' caches hold for this layer; None where that is Transformers' own."""
        if self._dense is None or self._layout is None:
            return None
        held = self._dense.new_held(self.kv_cache_type)
        if isinstance(held, RecurrentState):
            assert isinstance(self._layout, StateLayout), "of linear attention"
            return StoredState(held, self._layout)
        assert isinstance(self._layout, KeyLayout), "of any other"
        return StoredLayer(held, self._layout)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[batch, tokens, hidden]` -> the same; further arguments as the replaced layer's."""
        stored, tokens = self._stored(kwargs), hidden_states.shape[1]
        if stored is None or args or len(hidden_states) > 1 or not self._is_plain(stored.held.length, tokens, kwargs):
            answer: torch.Tensor = self.stock(hidden_states, *args, **kwargs)
            return answer
        assert self._dense is not None, "it has a cache of its own"
        with torch.no_grad():
            step = self._dense.memory.step(tokens)
            self.begin(step, stored.held.length).copy_(hidden_states[0])
            self.advance(stored, step)
            return step.hidden[None].to(hidden_states.dtype, copy=True)

    def takes(self, tokens: int, length: int) -> bool:
        """Whether a step of so many tokens, of a conversation of `length` with them, is a graph's."""
        return self._dense is not None and tokens <= self.most_tokens and self._dense.takes(tokens, length)

    def _is_plain(self, position: int, tokens: int, kwargs: Mapping[str, Any]) -> bool:
        """Whether a step just follows what is held, and every token sees all before it or its window."""
        places, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        end = position + tokens
        if not self.takes(tokens, end):
            return False
        own = torch.arange(position, end, device="cpu")
        if places is not None and not torch.equal(places.flatten(), own):
            return False
        if mask is None or mask.dim() != 4:
            return mask is None or bool(mask.all())
        assert self._dense is not None, "it takes steps"
        every, window = torch.arange(end, device="cpu"), getattr(self._dense.parts.attention, "window", 0)
        seen = (every <= own[:, None]) & (every > own[:, None] - (window or end + 1))
        allowed = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        return torch.equal(allowed[:, :end], seen)

    def _stored(self, kwargs: Mapping[str, Any]) -> StoredLayer | StoredState | None:
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        layers = getattr(cache, "layers", ())
        found = layers[self.layer] if self.layer < len(layers) else None
        return found if isinstance(found, StoredLayer | StoredState) and self._dense is not None else None

    def begin(self, step: StepMemory, position: int) -> torch.Tensor:
        """Say for all layers where a step begins; return where its hidden states are written, `[tokens, hidden]`."""
        assert self._dense is not None, "asked of layers that have one"
        return self._dense.begin(step, position)

    def advance(self, stored: StoredLayer | StoredState, step: StepMemory) -> None:
        """Put this layer's answer for `step.hidden` in its place, and hold what later tokens want of it."""
        assert self._dense is not None, "asked of layers that have one"
        self._add_experts(self._dense.compute(stored.held, step), step.hidden)

    def advance_together(self, stored: Sequence[StoredLayer | StoredState]) -> None:
        """The same for the rows that `memory.rows` has begun, a token of each of these conversations."""
        assert self._dense is not None, "asked of layers that have one"
        answer = self._dense.compute_rows([each.held for each in stored])
        self._add_experts(answer, self._dense.memory.rows.hidden, "decode")

    def _add_experts(self, answer: DenseAnswer, hidden: torch.Tensor, phase: Phase | None = None) -> None:
        """Write the layer's answer to `hidden`."""
        if answer.normed is None:
            hidden.copy_(answer.residual)
            return
        experts = self._experts[0]
        assert experts.runtime is not None and self._dense is not None, "the host attaches a runtime first"
        ids, weights = self._chosen(answer)
        if experts.runtime.wants_scores and answer.logits is not None:
            experts.note_logits(answer.logits)
        routed = experts(answer.normed, ids, weights, phase=phase)
        torch.add(answer.residual, routed, alpha=self._dense.parts.residual_factor, out=hidden)

    def _chosen(self, answer: DenseAnswer) -> tuple[torch.Tensor, torch.Tensor]:
        normed, logits, ids, weights = answer.normed, answer.logits, answer.ids, answer.weights
        assert normed is not None and logits is not None and self._dense is not None, "of a layer with experts"
        if ids is None or weights is None:
            choice = self._dense.parts.choice
            if choice is not None:
                weights, ids = choose(choice, logits)
            else:
                router, further = self._router[0]
                _, weights, ids = router.forward(normed, *further)
        return ids, weights
