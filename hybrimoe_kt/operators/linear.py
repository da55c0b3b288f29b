"""`QuantizedLinear`: a linear layer whose weight stays as the file has it, in blocks, where that stands or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.accelerators import is_host, numbered
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.linear import PackedProduct
from hybrimoe_kt.backends.gpu_dense import arithmetic_on, check_gpu, refusal
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.device.packed import PackedWeight
from hybrimoe_kt.errors import ConfigError, unknown_name

__all__ = ["READ_AS_FLOATS", "QuantizedLinear", "accelerator_arithmetic", "is_computed_by_ggml"]

CPU_ARITHMETIC = ("ggml", "float")
READ_AS_FLOATS = "is_read_as_floats"
"""An attribute of a linear layer whose weight others read, so that it has to be floats."""


def check_cpu(name: str) -> None:
    """ConfigError for what no product on a CPU is computed by."""
    if name not in CPU_ARITHMETIC:
        raise ConfigError(unknown_name("cpu", name, CPU_ARITHMETIC))


def is_computed_by_ggml(cpu: str, place: str) -> bool:
    """Whether what stands at `place` is computed by ggml: it does on a CPU where the library is there."""
    return cpu == "ggml" and is_host(place) and ggml.unusable() is None


def accelerator_arithmetic(gpu: str, place: str) -> str:
    """How what is placed on an accelerator is multiplied by, see `gpu_dense.arithmetic_on`; "float" anywhere else."""
    return "float" if is_host(place) or numbered(place) is None else arithmetic_on(device_at(place), gpu)


class QuantizedLinear(nn.Module):
    """In place of `torch.nn.Linear`. Floats where the file has floats, where a conversion changed the values, on a CPU
    without ggml, and on a device without kernels: then it is what it replaces.

    On an accelerator it multiplies once its host has loaded the weight there, alone or together with others that are
    given the same input, see `attach`.
    """

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
        gpu: str = "auto",
    ) -> None:
        """`cpu`: who multiplies there, "ggml" or "float"; `gpu`: "auto", "triton", "torch" or "float"."""
        super().__init__()
        self.check_kwargs({"cpu": cpu, "gpu": gpu})
        if type(orig_module) is not nn.Linear:
            raise ConfigError(f"{key}: QuantizedLinear replaces torch.nn.Linear, found {type(orig_module).__name__}")
        self.in_features, self.out_features = orig_module.in_features, orig_module.out_features
        self.bias = orig_module.bias
        self.packed: PackedWeight | None = None
        """The weight as the file has it, where it stays so."""
        self.place, self.arithmetic = generate_device, accelerator_arithmetic(gpu, generate_device)
        self._product: PackedProduct | None = None
        self._by_accelerator: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._gated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        by_ggml = is_computed_by_ggml(cpu, generate_device)
        may_be_packed = by_ggml or self.arithmetic != "float"
        if hasattr(gguf_loader, "packed_weight") and may_be_packed and not hasattr(orig_module, READ_AS_FLOATS):
            asked = f"{key}.weight", (self.out_features, self.in_features)
            refuses = () if by_ggml else (partial(refusal, arithmetic=self.arithmetic),)
            self.packed = gguf_loader.packed_weight(*asked, *refuses)
        if self.packed is None:
            self.weight = orig_module.weight
        elif by_ggml:
            self._product = PackedProduct(self.packed)

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_cpu(kwargs.get("cpu", "ggml"))
        check_gpu(kwargs.get("gpu", "auto"))

    @property
    def asks_ggml(self) -> bool:
        """Whether ggml multiplies, of which torch sees nothing."""
        return self._product is not None

    @property
    def waits_for_accelerator(self) -> bool:
        """Whether its weight is to be loaded to an accelerator, and is not yet."""
        return self.packed is not None and self._product is None and self._by_accelerator is None

    def attach(
        self,
        multiply: Callable[[torch.Tensor], torch.Tensor],
        gated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Multiply by `multiply` from now on: it takes what `forward` does, adds the bias and keeps the dtype.

        `gated` does what the method of that name does.
        """
        self._by_accelerator, self._gated = multiply, gated

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """`forward(silu(gate) * up)`, of few tokens with no launch more where kernels multiply."""
        answer: torch.Tensor = self(functional.silu(gate) * up) if self._gated is None else self._gated(gate, up)
        return answer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in the input's dtype."""
        if self._by_accelerator is not None:
            return self._by_accelerator(input)
        if self._product is None:
            return functional.linear(input, self.weight, self.bias)
        given = input.reshape(-1, self.in_features)
        out = self._product(given if given.dtype == torch.float32 else given.float())
        if self.bias is not None:
            out += self.bias
        return out.to(input.dtype).view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        kept = "float" if self.packed is None else " + ".join(part.name for part in self.packed.parts)
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kept}"
