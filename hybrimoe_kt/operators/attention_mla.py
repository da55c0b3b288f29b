"""Multi-head latent attention with the up-projections absorbed: DeepSeek's attention at decode speed.

The stock module expands the cached latents of every past token into keys and values at every step. Here queries
are projected into the latent space instead, so a step reads each cached latent once (DeepSeek-V2 paper,
section 2.1; 341 ms -> 22 ms per layer and step at 4096 tokens on one AVX2 core, transformers 5.23).
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from hybrimoe_kt.backends.attention_protocol import Asked, AskedPrompt
from hybrimoe_kt.backends.decode_attention import attention_on, check_kernel
from hybrimoe_kt.backends.ggml.up_projections import FusedUpProjections, SplitUpProjections, UpProjections
from hybrimoe_kt.backends.gpu_dense import check_gpu
from hybrimoe_kt.backends.gpu_up_projections import AcceleratorUpProjections
from hybrimoe_kt.backends.sdpa_attention import read_latents
from hybrimoe_kt.core.step_memory import SCORE_BYTES, score_bytes
from hybrimoe_kt.device.choose import device_at
from hybrimoe_kt.errors import HostCompatibilityError

from .attention import fixed_length, prompts_of
from .linear import READ_AS_FLOATS, accelerator_arithmetic, check_cpu, is_computed_by_ggml
from .pending_sum import pending
from .rotary import latent_rotation

__all__ = ["AbsorbedMLA"]

_Up = TypeVar("_Up", bound=UpProjections)
_ADOPTED = (
    "q_proj",
    "q_a_proj",
    "q_a_layernorm",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "kv_b_proj",
    "o_proj",
)
_TAKEN = frozenset({"hidden_states", "attention_mask", "past_key_values", "cache", "position_embeddings", "kwargs"})


class AbsorbedMLA(nn.Module):
    """Drop-in for DeepseekV2Attention and DeepseekV3Attention: adopts the submodules and their names, shares the cache.

    The latent cache keeps the stock layout (`kv_lora_rank` values and `qk_rope_head_dim` rotated ones per
    token), so it can be handed back and forth between the two.
    """

    q_proj: Any
    q_a_proj: Any
    q_a_layernorm: Any
    q_b_proj: Any
    kv_a_proj_with_mqa: Any
    kv_a_layernorm: Any
    kv_b_proj: Any
    o_proj: Any
    _stock: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str = "cpu",
        generate_device: str = "cpu",
        absorb_for_prefill: bool = True,
        cpu: str = "ggml",
        gpu: str = "auto",
        kernel: str = "auto",
    ) -> None:
        """`absorb_for_prefill=False` leaves prompts to the stock expansion, cheaper while the context is short.

        `cpu` and `gpu`: who multiplies by the up-projections, as of QuantizedLinear. They stay as the file has them
        where it has them as two tensors; where it has one, the half that turns latents into values does. `kernel`:
        who attends in a step whose length stands on the device, as of DecodeAttention.
        """
        super().__init__()
        if not hasattr(orig_module, "kv_b_proj"):
            raise HostCompatibilityError(
                f"{key}: AbsorbedMLA replaces latent attention (with a kv_b_proj), found {type(orig_module).__name__}"
            )
        if unknown := sorted(inspect.signature(orig_module.forward).parameters.keys() - _TAKEN):
            found = importlib.metadata.version("transformers")
            raise HostCompatibilityError(
                f"{key}: attention in transformers {found} takes {unknown[0]!r}, which AbsorbedMLA does not know; "
                f"install an older version, or leave the rule out"
            )
        stock: Any = orig_module
        self.layer_idx: int = stock.layer_idx
        self.config = config
        self.num_heads, self.kv_lora_rank = config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.absorb_for_prefill = absorb_for_prefill
        for name in _ADOPTED:
            self.register_module(name, getattr(orig_module, name, None))
        self._rotate = latent_rotation(orig_module)
        self._up: UpProjections | None = None
        self.check_kwargs({"cpu": cpu, "gpu": gpu, "kernel": kernel})
        self.kernel = kernel
        if kernel != "auto":
            attention_on(device_at(generate_device), kernel)  # refuses what cannot run there
        self.place, self.arithmetic = generate_device, accelerator_arithmetic(gpu, generate_device)
        if absorb_for_prefill and hasattr(gguf_loader, "packed_tensor"):
            if is_computed_by_ggml(cpu, generate_device):
                self._up = self._packed_up(gguf_loader, SplitUpProjections, FusedUpProjections)
            elif self.arithmetic != "float":
                made = AcceleratorUpProjections
                up = self._packed_up(gguf_loader, made.split, made.fused)
                self._up = None if up is None or up.refusal(self.arithmetic) else up
        if self._up is not None:
            self.kv_b_proj = None
        else:
            setattr(self.kv_b_proj, READ_AS_FLOATS, True)
        object.__setattr__(self, "_stock", orig_module)

    def _packed_up(self, gguf_loader: Any, split: Callable[..., _Up], fused: Callable[..., _Up]) -> _Up | None:
        names = (f"blk.{self.layer_idx}.attn_{name}.weight" for name in ("k_b", "v_b", "kv_b"))
        keys, values, both = (gguf_loader.packed_tensor(name) for name in names)
        heads, rank = self.num_heads, self.kv_lora_rank
        if keys is not None and values is not None:
            if (keys.heads, keys.rows, keys.columns) != (heads, rank, self.nope):
                return None  # told by what loads floats
            if (values.heads, values.rows, values.columns) != (heads, self.value, rank):
                return None
            return split(keys, values)
        if both is not None and (both.rows, both.columns) == (heads * (self.nope + self.value), rank):
            return fused(both, heads, self.nope, self.value)
        return None

    @property
    def up_projections(self) -> UpProjections | None:
        """Those that stay as the file has them; None where `kv_b_proj` has them as floats."""
        return self._up

    @property
    def asks_ggml(self) -> bool:
        """Whether ggml multiplies by the up-projections."""
        return isinstance(self._up, (SplitUpProjections, FusedUpProjections))

    @property
    def keeps_pairs(self) -> bool:
        """Whether rotated dimensions stay where they were; else those of a pair are half a head apart afterwards."""
        return type(self._stock).__name__ == "DeepseekV2Attention"

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_cpu(kwargs.get("cpu", "ggml"))
        check_gpu(kwargs.get("gpu", "auto"))
        check_kernel(kwargs.get("kernel", "auto"))

    @property
    def scaling(self) -> float:
        """What logits are multiplied by before the softmax; the stock module's, which long prompts may go to."""
        return float(self._stock.scaling)

    @scaling.setter
    def scaling(self, factor: float) -> None:
        self._stock.scaling = factor

    def rotate_by(self, kernel: str) -> None:
        """Turn queries and keys in one launch from now on, where `kernel` is one's name; see `FusedRotary`."""
        self._rotate = latent_rotation(self._stock, kernel)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        *,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states [batch, tokens, hidden]` -> the same shape; `position_embeddings` as the stock module's.

        Transformers calls the cache `past_key_values` up to 5.23, and `cache` from 5.24 on.
        """
        batch, tokens, _ = hidden_states.shape
        if tokens > 1 and not self.absorb_for_prefill:
            kwargs |= {"past_key_values": past_key_values} if cache is None else {"cache": cache}
            answer: tuple[torch.Tensor, None] = self._stock(  # by name: families order these differently
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
            return answer
        query = self.q_proj(hidden_states) if self.q_proj is not None else self._low_rank_query(hidden_states)
        query = query.view(batch, tokens, self.num_heads, self.nope + self.rope).transpose(1, 2)
        query_nope, query_rope = query.split([self.nope, self.rope], dim=-1)

        latent, key_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent).view(batch, 1, tokens, self.kv_lora_rank)
        key_rope = key_rope.view(batch, 1, tokens, self.rope)
        query_rope, key_rope = self._rotate(query_rope, key_rope, position_embeddings)
        past = past_key_values if cache is None else cache
        length = None if past is None else fixed_length(past, self.layer_idx)
        if past is not None:
            latent, key_rope = past.update(latent, key_rope, self.layer_idx)

        up = self._up or _FloatUpProjections(self.kv_b_proj.weight, self.num_heads, self.nope, self.value)
        query_latent = up.to_latent(query_nope)  # [batch, heads, tokens, rank]
        if length is not None:
            asked = Asked(query_latent, latent, key_rope, length, self.scaling, rotated_query=query_rope)
            read = attention_on(length.device, self.kernel).attend(asked)
        else:
            prompts = prompts_of(past, self.layer_idx, hidden_states, self.kernel)
            prompt = AskedPrompt(query_latent, latent, key_rope, self.scaling, rotated_query=query_rope)
            without_mask = None if prompts is None else prompts.attend(prompt)
            if without_mask is None:
                read = self._read(query_latent, query_rope, latent[:, 0], key_rope[:, 0], attention_mask)
            else:
                read = without_mask
        context = up.to_values(read)  # [batch, heads, tokens, value]
        attended = self.o_proj(context.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.value))
        return attended if length is None else pending(attended, kernel=self.kernel), None

    def _low_rank_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query: torch.Tensor = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        return query

    def _read(
        self,
        query: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend with queries `[batch, heads, tokens, rank]` and `[..., rope]` to `latent` and `key_rope`
        `[batch, length, ...]`; return what each reads, of `query`'s shape. Scores take at most `SCORE_BYTES`."""
        (batch, heads, tokens), length = query.shape[:3], latent.shape[1]
        if mask is None and tokens > 1:  # which means plain causal attention
            mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril(length - tokens)
        step = max(1, SCORE_BYTES // (batch * heads * length * score_bytes(query.element_size())))
        if tokens <= step:
            return read_latents(query, query_rope, latent, key_rope, mask, self.scaling)
        read = torch.empty_like(query)
        for first in range(0, tokens, step):
            piece = slice(first, first + step)
            seen = mask[..., piece, :] if mask is not None and mask.shape[-2] > 1 else mask
            queries = query[:, :, piece], query_rope[:, :, piece]
            read[:, :, piece] = read_latents(*queries, latent, key_rope, seen, self.scaling)
        return read


class _FloatUpProjections:
    """The up-projections of all heads as one float matrix `[heads * (nope + value), rank]`."""

    def __init__(self, weight: torch.Tensor, heads: int, nope: int, value: int) -> None:
        up = weight.view(heads, nope + value, -1)
        self._keys, self._values = up[:, :nope], up[:, nope:].transpose(1, 2)

    def to_latent(self, query: torch.Tensor) -> torch.Tensor:
        return query @ self._keys

    def to_values(self, latent: torch.Tensor) -> torch.Tensor:
        return latent @ self._values
