"""The launches of one token's attention; none waits, allocates or looks at a tensor's values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attention_configs import AttentionConfig, attention_config, latent_config, merge_config, num_splits
from .decode_attention import decode_attention
from .latent_attention import latent_attention
from .merge_splits import merge_splits
from .targets import Target

__all__ = ["AttentionKernels"]

_STEP = 8
"""Rows are so many numbers, or a multiple, long and apart: 16 bytes at least."""


class AttentionKernels:
    """Attends on one device; calls on one stream share what is written between two kernels."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._between: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def refuses(
        self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, is_latent: bool = False
    ) -> str | None:
        """Why they do not attend with `query [heads, width]` to rooms `[kv_heads, capacity, ...]`, None if they do.

        These are keys and values, or latents and their rotated part.
        """
        (heads, width), kv_heads = query.shape, first.shape[0]
        if first.element_size() < query.element_size():
            return f"keys in {first.dtype} would be widened to {query.dtype}, for which there are no registers"
        config = self._config(query, first, is_latent=is_latent)
        if config is None:
            each = f"{heads // kv_heads} heads of {width} numbers for each of keys and values"
            return f"no kernel for {self.target.name} has registers for {each} in {first.dtype}"
        if width % _STEP or any(stride % _STEP for room in (first, second) for stride in room.stride()[:-1]):
            return f"heads are {width} numbers wide or lie {first.stride(-2)} apart, kernels want multiples of {_STEP}"
        return None

    def grouped(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
        *,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> Callable[[], None]:
        """Return what writes `out [heads, width]`, contiguous; arguments as of `decode_attention` and `merge_splits`.

        What it writes between its kernels is allocated here.
        """
        (heads, width), kv_heads = query.shape, keys.shape[0]
        config = self._config(query, keys, is_latent=False)
        assert config is not None, "refused"
        between = self._space(query.device, heads, num_splits(self.target, kv_heads), width)
        merge = merge_config(self.target, width)

        def launch() -> None:
            decode_attention(query, keys, values, length, scaling, *between, config, window)
            merge_splits(*between, length, out, config, merge, window, sinks)

        return launch

    def latent(
        self,
        query: torch.Tensor,
        rotated_query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> Callable[[], None]:
        """Return what writes `out [heads, rank]`, contiguous; arguments as of `latent_attention`."""
        heads, rank = query.shape
        config = self._config(query, latents, is_latent=True)
        assert config is not None, "refused"
        between = self._space(query.device, heads, num_splits(self.target, -(-heads // config.heads)), rank)
        merge = merge_config(self.target, rank)

        def launch() -> None:
            latent_attention(query, rotated_query, latents, rotated, length, scaling, *between, config)
            merge_splits(*between, length, out, config, merge)

        return launch

    def _config(self, query: torch.Tensor, room: torch.Tensor, *, is_latent: bool) -> AttentionConfig | None:
        (heads, width), size, converts = query.shape, room.element_size(), room.dtype != query.dtype
        if is_latent:
            return latent_config(self.target, heads, width, size, converts=converts)
        return attention_config(self.target, heads // room.shape[0], width, size, converts=converts)

    def _space(self, device: torch.device, heads: int, splits: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The splits' answers and weights, of every layer with this shape."""
        key = heads, splits, width
        if key not in self._between:
            answers = torch.empty(heads, splits, width, dtype=torch.float32, device=device)
            self._between[key] = answers, torch.empty(heads, splits, dtype=torch.float32, device=device)
        return self._between[key]
