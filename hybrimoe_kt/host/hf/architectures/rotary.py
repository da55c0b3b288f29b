"""Rotary positions as a GGUF file describes them and llama.cpp reads that: frequencies, and factors beside them.

Transformers builds plain frequencies; `Rotary.apply` puts these in their place once the model stands. Interpolation
and YaRN after Peng et al. (arXiv 2309.00071), with llama.cpp's defaults where a file leaves something out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.gguf_file import GgufFile
from hybrimoe_kt.weights.lazy import values_of

__all__ = ["ROPE_FACTORS", "Rotary", "rotary_of"]

_BETA_FAST, _BETA_SLOW = 32.0, 1.0
"""Rotations within the original context from which on a frequency is left alone, and up to which it is interpolated."""
ROPE_FACTORS = "rope_freqs.weight"
_STANDS_STILL = 1e20
"""Divisor from which on a dimension is not turned at all; Gemma's files have 1e30."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """What positions are turned by; `factor` 1 means that nothing is stretched."""

    base: float
    kind: str = "linear"
    """Or "yarn"."""
    factor: float = 1.0
    original_tokens: int = 0
    """The context that YaRN stretches."""
    attention_factor: float = 1.0
    """On queries and keys beside what YaRN says, as the file has it."""
    log_multiplier: float = 0.0
    """Of latent attention: how much YaRN's factor grows with the logarithm of `factor`."""
    divisors: torch.Tensor | None = None
    """One for every frequency, float32 `[rotated // 2]`."""
    is_latent: bool = False
    """Whether YaRN also sharpens the softmax, as in DeepSeek's attention."""
    rounds: bool = True
    """Whether the range between kept and interpolated frequencies has whole ends."""
    window_base: float = 0.0
    """The base in layers with windows, where it is another; nothing is stretched there."""
    compressed_base: float = 0.0
    """That in layers which compress tokens: what is stretched are these alone, and nothing is magnified."""

    def of(self, kind: str) -> Rotary:
        """What layers of this kind, in Transformers' word, are turned by."""
        if kind == "main":
            return Rotary(base=self.base)
        if kind == "compress":
            return replace(
                self, base=self.compressed_base, attention_factor=1.0 / self._own if self.kind == "yarn" else 1.0
            )
        if kind != "sliding_attention":
            return self
        return Rotary(base=self.window_base or self.base)

    @property
    def parameters(self) -> dict[str, Any]:
        """What Transformers is told: plain rotation, which `apply` replaces."""
        return {"rope_type": "default", "rope_theta": self.base}

    def published(self, plain: dict[str, Any]) -> dict[str, Any]:
        """The same in the words of a config.json, for who builds rotations from that; `plain` are `parameters`.

        ModelError where no configuration can say it.
        """
        if all(isinstance(value, dict) for value in plain.values()):
            return {kind: self.of(kind).published(own) for kind, own in plain.items()}
        if self.divisors is not None:
            turned = int((self.divisors == 1.0).sum())
            if not (self.divisors[turned:] >= _STANDS_STILL).all():
                raise ModelError(
                    f"{ROPE_FACTORS} gives every frequency a factor of its own, which no config.json says; use a "
                    f"checkpoint"
                )
            return plain | {"rope_type": "proportional", "partial_rotary_factor": turned / self.divisors.numel()}
        if self.factor == 1.0 and self.magnitude == 1.0:
            return plain
        said = {"factor": self.factor, "original_max_position_embeddings": self.original_tokens}
        if self.kind != "yarn":
            return plain | {"rope_type": "linear", "factor": self.factor}
        if self.is_latent:
            said |= {"mscale": self.log_multiplier or 1.0, "mscale_all_dim": self.log_multiplier}
        said |= {"beta_fast": _BETA_FAST, "beta_slow": _BETA_SLOW, "truncate": self.rounds}
        return plain | {"rope_type": "yarn", "attn_factor": self.attention_factor} | said

    def frequencies(self, rotated: int) -> torch.Tensor:
        """Radians a position for each pair of `rotated` dimensions, float32 `[rotated // 2]`; ModelError."""
        # in Transformers' order of operations, so that a configuration of its own gives the same bits
        wavelengths = self.base ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        plain = 1.0 / wavelengths
        if self.divisors is not None:
            if self.divisors.shape != plain.shape:
                raise ModelError(f"{ROPE_FACTORS} has {self.divisors.numel()} values, {rotated} dimensions are rotated")
            wavelengths = wavelengths * self.divisors
            plain = 1.0 / wavelengths
        stretched = 1.0 / (self.factor * wavelengths)
        if self.kind != "yarn":
            return stretched
        first, last = self._place(_BETA_FAST, rotated), self._place(_BETA_SLOW, rotated)
        first, last = (math.floor(first), math.ceil(last)) if self.rounds else (first, last)
        first, last = max(first, 0), min(last, rotated - 1)
        pairs = torch.arange(rotated // 2, dtype=torch.float32)
        kept = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
        return stretched * (1 - kept) + plain * kept

    def _place(self, rotations: float, rotated: int) -> float:
        """Which pair of dimensions turns so often within the original context."""
        return rotated * math.log(self.original_tokens / (rotations * 2 * math.pi)) / (2 * math.log(self.base))

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by as they are rotated."""
        return self.attention_factor * (self._own if self.kind == "yarn" else 1.0)

    @property
    def sharpening(self) -> float:
        """What the logits of latent attention are multiplied by, twice."""
        own = (self._own if self.kind == "yarn" else self._grown(1.0)) * self.attention_factor
        return own * self._grown(self.log_multiplier)

    @property
    def _own(self) -> float:
        """YaRN's factor: latent attention with a multiplier has all of it in the softmax."""
        return self._grown(0.0 if self.is_latent and self.log_multiplier else 1.0)

    def _grown(self, multiplier: float) -> float:
        return 1.0 + 0.1 * multiplier * math.log(self.factor)

    def apply(self, model: nn.Module) -> None:
        """Put frequencies and factors into a built model's own rotations."""
        for module in model.modules():
            inverse = getattr(module, "inv_freq", None)
            if isinstance(inverse, torch.Tensor):
                self._set(module, "")
            for kind in ("full_attention", "sliding_attention", "main", "compress"):
                if hasattr(module, f"{kind}_inv_freq"):
                    self.of(kind)._for(getattr(module, f"{kind}_inv_freq").numel())._set(module, f"{kind}_")
            if self.is_latent and hasattr(module, "kv_b_proj"):
                config: Any = module.config
                head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
                module.scaling = head_dim**-0.5 * self.sharpening * self.sharpening

    def _for(self, num_pairs: int) -> Rotary:
        """The same with the first of `divisors`, which are as many as the widest kind of layers needs."""
        return self if self.divisors is None else replace(self, divisors=self.divisors[:num_pairs])

    def _set(self, module: nn.Module, kind: str) -> None:
        inverse = getattr(module, f"{kind}inv_freq")
        found = self.frequencies(2 * inverse.numel())
        for buffer in (inverse, getattr(module, f"{kind}original_inv_freq", None)):
            if isinstance(buffer, torch.Tensor):
                buffer.copy_(found)
        setattr(module, f"{kind}attention_scaling", self.magnitude)


def rotary_of(file: GgufFile, key: Any, *, is_latent: bool, rounds: bool = True) -> Rotary:
    """Read a file's rotary positions; `key` reads its metadata. ModelError for what cannot be."""

    def number(name: str, default: float) -> float:
        value = key(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"{file.path}: {file.architecture}.{name} is {value!r}, not a number")
        return float(value)

    kind = key("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"{file.path}: position scaling {kind!r} is not supported; valid: none, linear, yarn")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0)) or 1.0
    base = number("rope.freq_base", 10000.0)
    original = number("rope.scaling.original_context_length", number("context_length", 0.0))
    multiplier = number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1 if is_latent else 0.0
    if factor <= 0 or base <= 1 or (kind == "yarn" and original < 1):
        raise ModelError(f"{file.path}: positions cannot be scaled by {factor:g} with base {base:g} of {original:g}")
    stored = file.tensors.get(ROPE_FACTORS)
    return Rotary(
        base=base,
        kind=kind if kind == "yarn" else "linear",
        factor=1.0 if kind == "none" else factor,
        original_tokens=int(original),
        attention_factor=number("rope.scaling.attn_factor", 1.0),
        log_multiplier=multiplier,
        divisors=None if stored is None else values_of(stored, torch.float32, torch.device("cpu")),
        is_latent=is_latent,
        rounds=rounds,
        window_base=number("rope.freq_base_swa", 0.0),
        compressed_base=number("attention.compress_rope_freq_base", 0.0),
    )
