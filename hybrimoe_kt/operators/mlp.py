"""`FusedMLP`: a gated MLP whose activation and product are part of the launch behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.row_kernels import check_kernel, is_used
from hybrimoe_kt.errors import ConfigError

from .adopted import Adopted
from .linear import QuantizedLinear

__all__ = ["FusedMLP"]

_PARTS = ("gate_proj", "up_proj", "down_proj")
_are_swiglu: dict[frozenset[Any], bool] = {}
"""Class of MLPs and of their activation, and their numbers -> whether they compute what is known here."""
_TRIED, _WIDTH = 16, 32
_LARGE = 1024
"""How much larger every other try is: beyond what a family that clamps lets through."""


class FusedMLP(Adopted):
    """In place of any family's gated MLP, shared experts too; what it does is found out by asking it.

    Others stay as they are, and so do those whose last product is not a packed weight's on a GPU.
    """

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
        if not all(hasattr(orig_module, name) for name in (*_PARTS, "act_fn")):
            raise ConfigError(f"{key}: FusedMLP replaces a gated MLP, found {type(orig_module).__name__}")
        super().__init__(orig_module)
        self.kernel = kernel

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kernel(kwargs.get("kernel", "auto"))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., hidden]` -> the same, in the same dtype."""
        gate, up, down = (getattr(self, name) for name in _PARTS)
        is_plain = len(args) == 1 and not kwargs and is_used(self.kernel, args[0].device)
        if is_plain and isinstance(down, QuantizedLinear) and self._is_swiglu():
            return down.gated(gate(args[0]), up(args[0]))
        answer: torch.Tensor = super().forward(*args, **kwargs)
        return answer

    def _is_swiglu(self) -> bool:
        """Whether the stock module is `down(silu(gate(x)) * up(x))` bit for bit; asked once for each kind."""
        activation: Any = self.act_fn
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        kind = frozenset([*plain.items(), ("", self.stock_class), ("act_fn", type(activation))])
        if kind not in _are_swiglu:
            _are_swiglu[kind] = self._asked(activation)
        return _are_swiglu[kind]

    @torch.no_grad()
    def _asked(self, activation: nn.Module) -> bool:
        random = torch.Generator(device="cpu").manual_seed(20250405)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, device="cpu").bfloat16()

        modules: dict[str, Any] = {"act_fn": activation}
        for name in _PARTS:
            modules[name] = nn.Linear(_WIDTH, _WIDTH, bias=False, device="cpu", dtype=torch.bfloat16)
            modules[name].weight.data = drawn(_WIDTH, _WIDTH) / _WIDTH**0.5
        given = drawn(_TRIED, _WIDTH)
        given[::2] *= _LARGE
        gate, up, down = (modules[name] for name in _PARTS)
        found: torch.Tensor = self.stock_copy(_modules=modules).forward(given)
        return torch.equal(found, down(functional.silu(gate(given)) * up(given)))
