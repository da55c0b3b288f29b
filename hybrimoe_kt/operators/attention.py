"""`DecodeAttention`: grouped-query attention whose decode step reads on the device how many tokens are held."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.backends.decode_attention import attention_on, check_kernel
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.errors import HostCompatibilityError

from .pending_sum import pending

__all__ = ["DecodeAttention", "fixed_length"]

_NAME = "hybrimoe_fixed_length"
"""Of the function that is registered with Transformers."""
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What a family's module has whose attention asks its configuration for the function that attends."""


def fixed_length(cache: Any, layer: int) -> torch.Tensor | None:
    """The number of tokens held, this step's one among them, int64 `[1]` on the device; None in an ordinary step.

    In a *fixed* step a cache's layer says so by an attribute of this name, and its `update` returns all of its room,
    `[1, kv_heads, capacity, width]`, with this step's token in its place.
    """
    layers = getattr(cache, "layers", ())
    return getattr(layers[layer], "fixed_length", None) if layer < len(layers) else None


class DecodeAttention(nn.Module):
    """In place of an attention module of Transformers, whose parts it shares: exactly that, but for fixed steps.

    These go through the module's own code, too, up to where it attends: there a kernel reads what is held, which no
    mask says. Attention of other kinds, such as with latents, stays as it is, see `refusal`.
    """

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str = "cpu",
        kernel: str = "auto",
    ) -> None:
        """`kernel` attends in a fixed step: "flashinfer", "triton", "sdpa", or "auto", the first of them that runs."""
        super().__init__()
        self.check_kwargs({"kernel": kernel})
        self.key, self.kernel = key, kernel
        if kernel != "auto":
            attention_on(device_at(generate_device), kernel)  # refuses what cannot run there
        object.__setattr__(self, "_stock", orig_module)
        for parts in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[parts] = orig_module.__dict__[parts]  # loaded, moved and replaced for both
        self.refusal = _refusal(orig_module)
        """Why it takes no fixed step, None if it does."""

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kernel(kwargs.get("kernel", "auto"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_stock" not in self.__dict__:
                raise
            return getattr(self.stock, name)  # its widths and options

    def __setattr__(self, name: str, value: Any) -> None:
        stock = self.__dict__.get("_stock")
        if stock is not None and name in stock.__dict__ and name not in self.__dict__:
            setattr(stock, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def stock(self) -> nn.Module:
        """The module as Transformers built it, with operators in place of some of its parts."""
        found: nn.Module = self.__dict__["_stock"]
        return found

    def train(self, mode: bool = True) -> DecodeAttention:
        self.stock.training = mode
        super().train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module that it replaces."""
        cache, stock = kwargs.get("past_key_values", kwargs.get("cache")), self.__dict__["_stock"]
        length = None if cache is None else fixed_length(cache, stock.layer_idx)
        return stock(*args, **kwargs) if length is None else self._fixed(length, args, kwargs)

    def _fixed(self, length: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock code with another configuration, of this module alone: its model's decides about masks."""
        if self.refusal is not None:
            raise HostCompatibilityError(f"{self.key}: {self.refusal}, so it takes no step of a fixed length")
        stock = self.__dict__["_stock"]
        attend = partial(attention_on(length.device, self.kernel).attend, length=length)
        config = stock.config
        stock.config = _FixedConfig(config)
        try:
            answer, *others = stock(*args, **kwargs, attend_fixed=attend)
            return pending(answer, kernel=self.kernel), *others
        finally:
            stock.config = config


class _FixedConfig:
    """A configuration that names our function."""

    _attn_implementation = _NAME

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _refusal(module: nn.Module) -> str | None:
    """Register our function where there is a module that can ask for it; else say why not."""
    from transformers import AttentionInterface

    if hasattr(module, "kv_b_proj"):
        return "it attends to latents, which AbsorbedMLA reads"
    if not hasattr(module, "num_key_value_groups") or not hasattr(module, "layer_idx"):
        return f"{type(module).__name__} has no groups of query heads"
    if not hasattr(sys.modules[type(module).__module__], _INTERFACE):
        return f"{type(module).__name__} does not ask Transformers who attends"
    AttentionInterface.register(_NAME, _attend_fixed)
    return None


def _attend_fixed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attend_fixed: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers calls it: `query [1, heads, 1, width]`, all of the rooms, and what a family adds by name.

    What is not held is masked by the length, so `attention_mask` says nothing.
    """
    if query.shape[0] != 1 or query.shape[2] != 1:
        raise HostCompatibilityError(f"a step of a fixed length is one token of one conversation, not {query.shape}")
    if softcap:
        raise HostCompatibilityError("attention that caps its scores takes no step of a fixed length")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    answer = attend_fixed(query, key, value, scaling=factor, window=sliding_window or 0, sinks=s_aux)
    return answer.transpose(1, 2).contiguous(), None
