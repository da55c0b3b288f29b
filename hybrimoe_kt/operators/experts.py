"""`HybriMoEExperts`: what a rule file names in place of a model's routed experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError, ModelError
from hybrimoe_kt.runtime.runtime import Runtime

__all__ = ["HybriMoEExperts"]

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
        **kwargs: Any,
    ) -> None:
        super().__init__()
        match = _LAYER.search(f".{key}")
        if match is None:
            raise ConfigError(
                f"{key}: HybriMoEExperts replaces `...layers.N....experts`, this name has no layer number"
            )
        if not all(hasattr(orig_module, name) for name in ("num_experts", "hidden_dim", "intermediate_dim")):
            raise ConfigError(
                f"{key}: HybriMoEExperts replaces a layer's routed experts (`...mlp.experts`), "
                f"found {type(orig_module).__name__}"
            )
        activation = getattr(config, "hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"{key}: experts with activation {activation!r} are not supported; silu is")
        self.layer = int(match[1])
        options = ExpertOptions.from_kwargs(kwargs)
        self.runtime = Runtime.shared_by(gguf_loader, options, key)
        overrides = getattr(gguf_loader, "option_overrides", {})
        accelerator = _accelerator(options.replace(overrides).accelerator, generate_device)
        self.runtime.add_layer(
            gguf_loader.layer_experts(
                self.layer,
                num_experts=orig_module.num_experts,
                top_k=config.num_experts_per_tok,
                hidden=orig_module.hidden_dim,
                inter=orig_module.intermediate_dim,
            ),
            accelerator,
        )

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        devices = ("prefill_device", "generate_device", "out_device")
        ExpertOptions.from_kwargs({name: value for name, value in kwargs.items() if name not in devices})

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states [num_tokens, hidden]`, ids and weights `[num_tokens, top_k]` -> `[num_tokens, hidden]`."""
        return self.runtime.run(self.layer, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        return f"layer={self.layer}"


def _accelerator(name: str, generate_device: str | None) -> str:
    """Which accelerator serves the layer: the one named, or under "auto" the numbered device its rule gives it."""
    if name != "auto" or generate_device is None:
        return name
    if re.fullmatch(r"emulated:\d+", generate_device):
        return generate_device
    device = re.fullmatch(r"(cuda|xpu):\d+", generate_device)
    if device is None or not getattr(torch, device[1]).is_available():
        return name
    return generate_device
