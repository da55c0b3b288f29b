"""`DecodeAttention`: grouped-query attention whose decode step reads on the device how many tokens are held."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from hybrimoe_kt.backends.attention_protocol import Asked, AskedPrompt
from hybrimoe_kt.backends.decode_attention import DeviceAttention, attention_on, check_kernel
from hybrimoe_kt.backends.prompt_attention import PromptAttention, prompts_on
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.errors import HostCompatibilityError

from .pending_sum import pending

__all__ = ["DecodeAttention", "fixed_length", "prompts_of"]

_FIXED, _PROMPT = "hybrimoe_fixed_length", "hybrimoe_prompt"
"""Functions that are registered with Transformers."""
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What a family's module has whose attention asks its configuration for the function that attends."""
_CAPS = "attn_logit_softcapping", "softcap"
"""What modules, or their configurations, call a limit of scores."""
_UNDERSTOOD = {
    "attention_mask",
    "dropout",
    "is_causal",
    "position_ids",
    "s_aux",
    "scaling",
    "sliding_window",
    "softcap",
}
"""What may be given by name to who attends: one token's answer depends on nothing else, and not on all of these."""


def fixed_length(cache: Any, layer: int) -> torch.Tensor | None:
    """The number of tokens held, this step's one among them, int64 `[1]` on the device; None in an ordinary step.

    In a *fixed* step a cache's layer says so by an attribute of this name, and its `update` returns all of its room,
    `[1, kv_heads, capacity, width]`, in any dtype, with this step's token in its place.
    """
    layers = getattr(cache, "layers", ())
    return getattr(layers[layer], "fixed_length", None) if layer < len(layers) else None


def prompts_of(cache: Any, layer: int, hidden: torch.Tensor, kernel: str) -> PromptAttention | None:
    """Who attends to tokens `hidden [batch, tokens, width]` without a mask; None: the model's own code does, with one.

    A mask says nothing where a cache's layer `holds_one_text`: every token sees all before it.
    """
    layers = getattr(cache, "layers", ())
    if hidden.shape[0] != 1 or hidden.shape[1] == 1 or layer >= len(layers):
        return None
    return prompts_on(hidden.device, kernel) if getattr(layers[layer], "holds_one_text", False) else None


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
        if cache is None:
            return stock(*args, **kwargs)
        if (length := fixed_length(cache, stock.layer_idx)) is not None:
            if self.refusal is not None:
                raise HostCompatibilityError(f"{self.key}: {self.refusal}, so it takes no step of a fixed length")
            attend = attention_on(length.device, self.kernel), length
            answer, *others = self._asking(_FIXED, args, kwargs | {"attend_fixed": attend})
            return pending(answer, kernel=self.kernel), *others
        hidden = args[0] if args else kwargs["hidden_states"]
        prompts = None if self.refusal else prompts_of(cache, stock.layer_idx, hidden, self.kernel)
        return stock(*args, **kwargs) if prompts is None else self._asking(_PROMPT, args, kwargs | {"prompts": prompts})

    def _asking(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The stock code with another configuration, of this module alone: its model's decides about masks."""
        stock = self.__dict__["_stock"]
        config = stock.config
        stock.config = _Config(config, name)
        try:
            return stock(*args, **kwargs)
        finally:
            stock.config = config


class _Config:
    """A configuration that names one of our functions."""

    def __init__(self, config: Any, name: str) -> None:
        self._config, self._attn_implementation = config, name

    @property
    def usual(self) -> Any:
        """What it named before."""
        return self._config._attn_implementation

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
    config = getattr(module, "config", None)
    if any(getattr(owner, name, None) for owner in (module, config) for name in _CAPS):
        return "it caps its scores"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "its model attends in chunks of positions, which only a mask says"
    if getattr(config, "attn_temperature_tuning", False):
        return "its queries grow with their position, which is counted on the host"
    if unknown := sorted(_given_by_name(module) - _UNDERSTOOD):
        return f"{type(module).__name__} attends with {', '.join(unknown)}"
    AttentionInterface.register(_FIXED, _attend_fixed)
    AttentionInterface.register(_PROMPT, _attend_prompt)
    return None


def _given_by_name(module: nn.Module) -> set[str]:
    """What a module gives by name to who attends, as its compiled code has it."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    calls = [names for names in getattr(code, "co_consts", ()) if isinstance(names, tuple) and "scaling" in names]
    return {name for names in calls for name in names}


def _attend_fixed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attend_fixed: tuple[DeviceAttention, torch.Tensor],
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As Transformers calls it: `query [1, heads, 1, width]`, all of the rooms, and what a family adds by name.

    What is not held is masked by the length, so `attention_mask` says nothing.
    """
    if query.shape[0] != 1 or query.shape[2] != 1:
        raise HostCompatibilityError(f"a step of a fixed length is one token of one conversation, not {query.shape}")
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    (attention, length), window = attend_fixed, sliding_window or 0
    answer = attention.attend(Asked(query, key, value, length, factor, window, s_aux))
    return answer.transpose(1, 2).contiguous(), None


def _attend_prompt(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    prompts: PromptAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """As Transformers calls it: `query [1, heads, tokens, width]`, keys and values of all tokens up to these."""
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    answer = prompts.attend(AskedPrompt(query, key, value, factor, sliding_window or 0, s_aux))
    if answer is not None:
        return answer.transpose(1, 2).contiguous(), None
    stock, config = sys.modules[type(module).__module__], cast("_Config", module.config)
    usual = getattr(stock, _INTERFACE).get_interface(config.usual, stock.eager_attention_forward)
    given = {"scaling": scaling, "sliding_window": sliding_window, "s_aux": s_aux}
    kwargs |= {name: value for name, value in given.items() if value is not None}
    return usual(module, query, key, value, attention_mask, **kwargs)
