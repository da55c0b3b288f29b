"""`HybriMoEExperts`: what a rule file names in place of a model's routed experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.accelerators import numbered
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Phase
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError
from hybrimoe_kt.runtime import Job, ModelExperts, Routed, Runtime
from hybrimoe_kt.runtime.step_pieces import StepPieces

__all__ = ["HybriMoEExperts"]

_WIDTHS, _INNER_WIDTHS = ("hidden_dim", "hidden_size"), ("intermediate_dim", "intermediate_size")
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_k")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class HybriMoEExperts(nn.Module):
    """Routed experts of one layer, handed step by step to the model's `Runtime`.

    Constructor contract of kTransformers' operators. `kwargs` are the options of `ExpertOptions`, alike for all
    layers but for `accelerator`; where that is "auto", a `generate_device` such as cuda:1 (or emulated:1) names this
    layer's. Holds no parameters: the weights stay in the loader's mapping.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
        out_device: str | None = None,
        *,
        experts: ModelExperts | None = None,
        **kwargs: Any,
    ) -> None:
        """`experts`, which the host hands in, takes the layer's; its runtime comes later, by `attach`."""
        super().__init__()
        if experts is None:
            raise HostCompatibilityError(f"{key}: this host has no place for the experts of HybriMoEExperts")
        match = _LAYER.search(f".{key}")
        if match is None:
            raise ConfigError(
                f"{key}: HybriMoEExperts replaces `...layers.N....experts`, this name has no layer number"
            )
        hidden, inter = _sizes_of(orig_module)
        if not hasattr(orig_module, "num_experts") or hidden is None or inter is None:
            raise ConfigError(
                f"{key}: HybriMoEExperts replaces a layer's routed experts (`...mlp.experts`), "
                f"found {type(orig_module).__name__}"
            )
        self.layer = int(match[1])
        self.runtime: Runtime | StepPieces | None = None
        self._logits: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        options = experts.agree(ExpertOptions.from_kwargs(kwargs), key)
        experts.add(
            gguf_loader.layer_experts(
                self.layer,
                num_experts=orig_module.num_experts,
                top_k=_first_of(config, _TOP_K),
                hidden=hidden,
                inter=inter,
            ),
            _accelerator(options.accelerator, generate_device),
        )

    def attach(self, runtime: Runtime | StepPieces) -> None:
        """Compute with `runtime`, or what stands in its place while a step is captured, from now on."""
        self.runtime = runtime

    def note_logits(self, logits: torch.Tensor, probabilities: torch.Tensor | None = None) -> None:
        """Take the router's logits `[num_tokens, num_experts]` of the step about to come, and their softmax if known.

        That is float32.
        """
        self._logits = logits, probabilities

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        devices = ("prefill_device", "generate_device", "out_device")
        ExpertOptions.from_kwargs({name: value for name, value in kwargs.items() if name not in devices})

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        phase: Phase | None = None,
    ) -> torch.Tensor:
        """`hidden_states [num_tokens, hidden]`, ids and weights `[num_tokens, top_k]` -> `[num_tokens, hidden]`.

        `phase` as of `Routed`: several tokens are a prompt's unless it says "decode".
        """
        return self.finish(self.begin(hidden_states, top_k_index, top_k_weights, phase))

    def begin(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        phase: Phase | None = None,
    ) -> Job:
        """Start what `forward` does; what is computed until `finish` runs beside the CPU's share."""
        assert self.runtime is not None, "the host attaches a runtime before the first step"
        (logits, probabilities), self._logits = self._logits, (None, None)
        routed = Routed(hidden_states, top_k_index, top_k_weights, logits, phase, probabilities)
        return self.runtime.begin(self.layer, routed)

    def finish(self, job: Job) -> torch.Tensor:
        """Wait for what `begin` started, and return its answer."""
        assert self.runtime is not None, "it has begun the step"
        return self.runtime.finish(job)

    def extra_repr(self) -> str:
        return f"layer={self.layer}"


def _sizes_of(module: nn.Module) -> tuple[int | None, int | None]:
    """How wide what enters experts is, and what lies between: of those without a gate their matrices say it."""
    up = getattr(module, "up_proj", None)
    if isinstance(up, torch.Tensor) and up.dim() == 3:
        return up.shape[2], up.shape[1]
    return _first_of(module, _WIDTHS), _first_of(module, _INNER_WIDTHS)


def _first_of(owner: object, names: tuple[str, ...]) -> Any:
    """The first attribute of these names that is there, None without one."""
    return next((value for name in names if (value := getattr(owner, name, None)) is not None), None)


def _accelerator(name: str, generate_device: str | None) -> str:
    """Which accelerator serves the layer: the one named, or under "auto" the numbered device its rule gives it."""
    if name != "auto" or generate_device is None:
        return name
    given = numbered(generate_device)
    if given is None or given.number is None:
        return name
    is_there = given.torch_type == "cpu" or getattr(torch, given.torch_type).is_available()
    return generate_device if is_there else name
