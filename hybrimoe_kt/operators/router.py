"""`FusedRouter`: a router whose choice is one launch after its product."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.ggml.choice import choice_of
from hybrimoe_kt.backends.row_kernels import Ranking, check_kernel, choose, is_used, logits_of, takes_ranking
from hybrimoe_kt.errors import ConfigError

from .adopted import Adopted

__all__ = ["FusedRouter"]

_GROUPS, _BEST_GROUPS = ("num_group", "n_group"), "topk_group"
_TRIED, _WIDTH = 64, 32
"""Random states by which a router's choice is found out, and how wide they are."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What a router does: whether its product is in float32, and whether weights have the states' dtype."""

    ranking: Ranking
    is_wide: bool
    rounds: bool


_forms: dict[frozenset[Any], _Form | None] = {}


class FusedRouter(Adopted):
    """In place of any family's top-k router; what it does is found out by asking it. Others stay as they are.

    Logits, weights and ids come as the stock module's, but for the dtype of weights on a GPU: float32, rounded to the
    stock module's.
    """

    weight: nn.Parameter

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
        kernel: str = "auto",
    ) -> None:
        """`kernel`: "triton", "torch", or "auto", which is Triton's on a GPU and torch's anywhere else."""
        self.check_kwargs({"kernel": kernel})
        weight = getattr(orig_module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not hasattr(orig_module, "top_k"):
            raise ConfigError(f"{key}: FusedRouter replaces a top-k router, found {type(orig_module).__name__}")
        super().__init__(orig_module)
        self.kernel = kernel
        self.probabilities: torch.Tensor | None = None
        """Softmax of the last step's logits, float32 `[num_tokens, num_experts]`, where its kernel wrote it."""

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kernel(kwargs.get("kernel", "auto"))

    def forward(self, hidden_states: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits `[num_tokens, num_experts]`, weights and ids `[num_tokens, top_k]` for states `[..., hidden]`."""
        form = self._form() if is_used(self.kernel, hidden_states.device) else None
        if form is None:
            self.probabilities = None
            answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = super().forward(hidden_states, *inputs)
            return answer
        rows, weight = hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight
        added = getattr(self, "bias", None)
        logits = logits_of(rows, weight) if form.is_wide else functional.linear(rows.to(weight.dtype), weight, added)
        logits = logits + added if form.is_wide and added is not None else logits
        ranking = replace(form.ranking, rounded_to=hidden_states.dtype) if form.rounds else form.ranking
        weights, ids, self.probabilities = choose(logits, ranking, _bias_of(self, inputs))
        return logits, weights, ids

    def _form(self) -> _Form | None:
        """What the stock router does with these attributes; None where no choice known here is the same."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        key = frozenset([*plain.items(), ("", self.stock_class), ("weight", len(self.weight))])
        if key not in _forms:
            form = self._asked()
            _forms[key] = form if form is not None and takes_ranking(form.ranking, len(self.weight)) else None
        return _forms[key]

    @torch.no_grad()
    def _asked(self) -> _Form | None:
        """Ask the stock router with small random weights, in float32 for the choice and in bfloat16 for the dtypes."""
        random = torch.Generator(device="cpu").manual_seed(20250405)
        num_experts = len(self.weight)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, device="cpu")

        router: Any = copy.deepcopy(self).to("cpu")
        if hasattr(router, "hidden_dim"):
            router.hidden_dim = _WIDTH
        for value in (*router.parameters(), *router.buffers()):
            if value.numel() == num_experts:
                value.data = drawn(*value.shape).to(value.dtype) / 5
        weight, hidden = drawn(num_experts, _WIDTH) * 2 / _WIDTH**0.5, drawn(_TRIED, _WIDTH)
        further = tuple(drawn(num_experts) / 5 for _ in list(inspect.signature(self.forward_of).parameters)[2:])

        def stock(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            router.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if isinstance(getattr(router, "bias", None), torch.Tensor):
                router.bias = nn.Parameter(router.bias.to(dtype), requires_grad=False)
            answer: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.forward_of(
                router, hidden.to(dtype), *further
            )
            return answer

        logits, weights, ids = stock(torch.float32)
        if not logits.is_floating_point():  # Granite's, which gave ids first up to Transformers 5.20
            return None
        added = getattr(router, "bias", None)
        if not torch.allclose(logits, functional.linear(hidden, weight, added), rtol=1e-5, atol=1e-5):
            return None
        found = choice_of(
            logits.float(),
            weights,
            ids,
            factor=float(getattr(router, "routed_scaling_factor", 1.0)),
            bias=_bias_of(router, further),
            num_groups=next((int(n) for name in _GROUPS if (n := getattr(router, name, None))), 1),
            num_best_groups=int(getattr(router, _BEST_GROUPS, None) or 1),
        )
        if found is None:
            return None
        half = torch.bfloat16
        narrow_logits, narrow_weights, _ = stock(half)
        halves = [value.to(half) for value in (hidden, weight, added) if value is not None]
        narrow, wide = functional.linear(*halves).float(), functional.linear(*(value.float() for value in halves))
        is_wide = torch.equal(narrow_logits.float(), wide)
        if not is_wide and not torch.equal(narrow_logits.float(), narrow):
            return None
        ranking = Ranking(
            top_k=found.top_k,
            is_sigmoid=found.scores == "sigmoid",
            num_groups=found.num_groups,
            num_best_groups=found.num_best_groups,
            is_group_of_two=found.is_group_of_two,
            is_normalised=found.is_normalised,
            factor=found.factor,
            **({"least": float(router.norm_min)} if hasattr(router, "norm_min") else {}),
        )
        return _Form(ranking, is_wide, narrow_weights.dtype == half)

    @property
    def forward_of(self) -> Any:
        """The stock class's `forward`, a function of the module too."""
        return self.stock_class.forward


def _bias_of(router: Any, inputs: tuple[Any, ...]) -> torch.Tensor | None:
    """What is added to scores before the choice, float32 `[num_experts]`: the router's own, or given to it."""
    owners = router, getattr(router, "moe_statics", None)  # ERNIE's
    known = [getattr(owner, "e_score_correction_bias", None) for owner in owners]
    found = next((value for value in (*known, *inputs) if isinstance(value, torch.Tensor)), None)
    return None if found is None else found.detach().float().flatten()
