"""Attention of one token by this package's Triton kernels, which read the length on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from hybrimoe_kt.device import step_graph
from hybrimoe_kt.errors import KernelError, summary
from hybrimoe_kt.kernels.failures import launch_failures

from .gpu_triton import TritonGpu, target_of
from .sdpa_attention import Asked

__all__ = ["TritonAttention"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class TritonAttention:
    """On one device, or in Triton's interpreter; calls must be on one stream."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        from hybrimoe_kt.kernels.attention import AttentionKernels

        self._device, self._kernels = device, AttentionKernels(target_of(device))

    @staticmethod
    def unusable(device: torch.device) -> str | None:
        """Why the kernels cannot run on `device`, None when they can."""
        return TritonGpu.unusable(device)

    def refuses(self, query: torch.Tensor, first: torch.Tensor, second: torch.Tensor, asked: Asked) -> str | None:
        parts = query, first, second
        if any(part.dtype not in _FLOATS for part in parts):
            return f"kernels read {', '.join(str(kind) for kind in _FLOATS)}, keys are {first.dtype}"
        if first.dtype != second.dtype or any(part.stride(-1) != 1 for part in parts):
            return "keys and values differ in dtype, or their rows are not contiguous"
        rooms = first[0], second[0]
        reason: str | None = self._kernels.refuses(query[0, :, 0], *rooms, is_latent=asked.is_latent)
        return reason

    def plan(self, length: int) -> None:
        """Nothing: lengths are read where they are."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
        *,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        given = query[0, :, 0], keys[0], values[0], length, scaling, out[0, :, 0]
        self._launch(self._kernels.grouped(*given, window=window, sinks=sinks))
        return out

    def attend_latents(
        self,
        query: torch.Tensor,
        rotated_query: torch.Tensor,
        latents: torch.Tensor,
        rotated: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        queries, rooms = (query[0, :, 0], rotated_query[0, :, 0]), (latents[0, 0], rotated[0, 0])
        self._launch(self._kernels.latent(*queries, *rooms, length, scaling, out[0, :, 0]))
        return out

    def _launch(self, launch: Callable[[], None]) -> None:
        def work() -> None:
            try:
                with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
                    launch()
            except launch_failures() as error:
                raise KernelError(
                    f"Triton cannot attend: {summary(error)}; a rule with kernel: sdpa does without it"
                ) from error

        step_graph.opaque(work)
