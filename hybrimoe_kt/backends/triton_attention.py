"""Attention of one token by this package's Triton kernels, which read the length on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from hybrimoe_kt.device import step_graph
from hybrimoe_kt.errors import KernelError, summary
from hybrimoe_kt.kernels.failures import launch_failures

from .attention_protocol import Asked
from .gpu_triton import TritonGpu, target_of

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

    def refuses(self, asked: Asked) -> str | None:
        query, first, second = parts = asked.query, asked.keys, asked.values
        if any(part.dtype not in _FLOATS for part in parts):
            return f"kernels read {', '.join(str(kind) for kind in _FLOATS)}, keys are {first.dtype}"
        if first.dtype != second.dtype or any(part.stride(-1) != 1 for part in parts):
            return "keys and values differ in dtype, or their rows are not contiguous"
        reason: str | None = self._kernels.refuses(query[0, :, 0], first[0], second[0], is_latent=asked.is_latent)
        return reason

    def plan(self, length: int) -> None:
        """Nothing: lengths are read where they are."""

    def attend(self, asked: Asked) -> torch.Tensor:
        out = torch.empty(asked.query.shape, dtype=asked.query.dtype, device=asked.query.device)
        query, keys, values, given = asked.query[0, :, 0], asked.keys[0], asked.values[0], (asked.length, asked.scaling)
        if asked.rotated_query is not None:
            rotated = asked.rotated_query[0, :, 0]
            launch = self._kernels.latent(query, rotated, keys[0], values[0], *given, out[0, :, 0])
        else:
            more = {"window": asked.window, "sinks": asked.sinks}
            launch = self._kernels.grouped(query, keys, values, *given, out[0, :, 0], **more)
        self._launch(launch)
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
