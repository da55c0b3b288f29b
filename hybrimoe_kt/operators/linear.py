"""`QuantizedLinear`: a linear layer whose weight stays as the file has it, in blocks, where that stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.linear import PackedProduct
from hybrimoe_kt.device.packed import PackedWeight
from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["QuantizedLinear", "is_computed_by_ggml"]

CPU_ARITHMETIC = ("ggml", "float")


def check_cpu(name: str) -> None:
    """ConfigError for what no product on a CPU is computed by."""
    if name not in CPU_ARITHMETIC:
        raise ConfigError(unknown_name("cpu", name, CPU_ARITHMETIC))


def is_computed_by_ggml(cpu: str, device: str) -> bool:
    """Whether what stands on `device` is computed by ggml: it does on a CPU where the library is there."""
    return cpu == "ggml" and torch.device(device).type == "cpu" and ggml.unusable() is None


class QuantizedLinear(nn.Module):
    """In place of `torch.nn.Linear`, on a CPU. Floats where the file has floats, where a conversion changed the
    values, without ggml and on other devices: then it is what it replaces."""

    bias: nn.Parameter | None

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str = "cpu",
        out_device: str | None = None,
        cpu: str = "ggml",
    ) -> None:
        """`cpu`: who multiplies there, "ggml" or "float"."""
        super().__init__()
        check_cpu(cpu)
        if type(orig_module) is not nn.Linear:
            raise ConfigError(f"{key}: QuantizedLinear replaces torch.nn.Linear, found {type(orig_module).__name__}")
        self.in_features, self.out_features = orig_module.in_features, orig_module.out_features
        self.bias = orig_module.bias
        self._product: PackedProduct | None = None
        self.packed: PackedWeight | None = None
        if hasattr(gguf_loader, "packed_weight") and is_computed_by_ggml(cpu, generate_device):
            self.packed = gguf_loader.packed_weight(f"{key}.weight", (self.out_features, self.in_features))
            self._product = None if self.packed is None else PackedProduct(self.packed)
        if self._product is None:
            self.weight = orig_module.weight

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_cpu(kwargs.get("cpu", "ggml"))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the input's dtype."""
        if self._product is None:
            return functional.linear(input, self.weight, self.bias)
        given = input.reshape(-1, self.in_features)
        out = self._product(given if given.dtype == torch.float32 else given.float())
        if self.bias is not None:
            out += self.bias
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kept = "float" if self._product is None else self._product
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kept}"
