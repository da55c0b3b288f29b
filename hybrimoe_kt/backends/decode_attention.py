"""Who attends for one token to a room of keys and values, as many of which hold tokens as a tensor on the device says.

FlashInfer, then this package's Triton kernels, then torch: for each shape the first that runs there, takes it and, when
it is first asked, answers a small case as torch does on a CPU. What it does in a step can be captured and replayed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hybrimoe_kt.errors import ConfigError, summary, unknown_name

from .attention_protocol import Asked, Attention
from .flashinfer_attention import FlashInferAttention
from .sdpa_attention import SdpaAttention
from .triton_attention import TritonAttention

__all__ = ["ATTENTION", "DeviceAttention", "attention_on", "check_kernel", "survey", "workspace_bytes"]

logger = logging.getLogger(__name__)

ATTENTION = ("auto", "flashinfer", "triton", "sdpa")
_ORDER: dict[str, Any] = {"flashinfer": FlashInferAttention, "triton": TritonAttention, "sdpa": SdpaAttention}
_TRIED_TOKENS, _TRIED_ROOM = 83, 96
_WITHIN = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of the answer's norm; GPUs may multiply float32 with fewer bits."""
_ALIGNED = 8
"""Numbers; kernels may want rows to begin at a multiple."""


def check_kernel(name: str) -> None:
    """ConfigError for what no attention is called."""
    if name not in ATTENTION:
        raise ConfigError(unknown_name("kernel", name, ATTENTION))


def survey(device: torch.device, kernel: str = "auto") -> dict[str, str | None]:
    """Say for each attention, best first, why it cannot run on `device`, None where it can; nothing is tried."""
    names = [name for name in _ORDER if kernel in ("auto", name)]
    return {name: _unusable(name, device, kernel) for name in names}


def _unusable(name: str, device: torch.device, kernel: str) -> str | None:
    if device.type == "cpu" and kernel == "auto" and name != "sdpa":
        return "on the CPU torch attends"  # where the interpreter would run, too
    unusable: Callable[[torch.device], str | None] | None = getattr(_ORDER[name], "unusable", None)
    return None if unusable is None else unusable(device)


def workspace_bytes(
    device: torch.device,
    kernel: str,
    widths: tuple[int, int],
    dtype: torch.dtype,
    kept: torch.dtype,
    *,
    is_latent: bool = False,
) -> int:
    """What attention takes of a device for ever: FlashInfer's, where it would attend; others take next to nothing.

    To two rooms of such widths, kept in `kept`, with queries in `dtype`. Nothing is tried, so it is an upper bound.
    """
    if survey(device, kernel).get("flashinfer", "it is not asked") is not None:
        return 0
    keys, values = (torch.empty(1, 1, 1, width, dtype=kept, device="meta") for width in widths)
    query, length = keys.to(dtype), torch.empty(1, dtype=torch.int64, device="meta")
    asked = Asked(query, keys, values, length, 1.0, rotated_query=query if is_latent else None)
    return 0 if FlashInferAttention(device).refuses(asked) else FlashInferAttention.num_bytes


def attention_on(device: torch.device, kernel: str = "auto") -> DeviceAttention:
    """The one attention of a device that layers share; ConfigError where a kernel that is named cannot run there."""
    return _attention_on(device, kernel)


@functools.cache
def _attention_on(device: torch.device, kernel: str) -> DeviceAttention:
    check_kernel(kernel)
    reasons = survey(device, kernel)
    if kernel != "auto" and reasons[kernel] is not None:
        raise ConfigError(f"kernel is {kernel!r}, but {reasons[kernel]}; or give auto")
    usable = [name for name, reason in reasons.items() if reason is None]
    return DeviceAttention(device, [_ORDER[name](device) for name in dict.fromkeys((*usable, "sdpa"))])


class DeviceAttention:
    """Asks for each shape who takes it, once, and gives it to them from then on; the first step is not captured."""

    def __init__(self, device: torch.device, candidates: list[Attention]) -> None:
        """The last of `candidates` takes everything."""
        self._device, self._candidates = device, candidates
        self._chosen: dict[tuple[object, ...], Attention] = {}
        self._failed: set[str] = set()

    def plan(self, length: int) -> None:
        """Before every step, captured or not, in which `length` tokens are held, this step's one among them."""
        for attention in self._candidates:
            attention.plan(length)

    def attend(self, asked: Asked) -> torch.Tensor:
        """As of `Attention`."""
        rooms = asked.keys, asked.values
        key = asked.is_latent, asked.window, asked.sinks is None, *map(_form, (asked.query, *rooms))
        found = self._chosen.get(key)
        if found is None:
            found = self._chosen[key] = self._choose(asked)
            kept = tuple(asked.keys.shape), asked.keys.dtype
            logger.debug("%s attends on %s to %s %s", found.name, self._device, *kept)
        return found.attend(asked)

    def _choose(self, asked: Asked) -> Attention:
        *better, last = self._candidates
        for attention in better:
            if attention.name in self._failed:
                continue
            if reason := attention.refuses(asked):
                logger.info("%s does not attend on %s: %s", attention.name, self._device, reason)
                continue
            if (problem := _tried(attention, asked)) is None:
                return attention
            self._failed.add(attention.name)
            logger.warning("%s does not attend on %s from now on: %s", attention.name, self._device, problem)
        return last


def _form(part: torch.Tensor) -> tuple[object, ...]:
    """All that kernels may ask of a query or a room; a room that grows is of the same form."""
    return part.dtype, part.shape[1], part.shape[-1], *(stride % _ALIGNED for stride in part.stride()[1:-1])


def _tried(attention: Attention, asked: Asked) -> str | None:
    """What is wrong with its answer for a few tokens of the same heads, None if nothing is."""
    generator = torch.Generator(device="cpu").manual_seed(20250614)
    device, host = asked.query.device, torch.device("cpu")

    def like(part: torch.Tensor | None, tokens: int | None = None) -> torch.Tensor | None:
        if part is None:
            return None
        shape = part.shape if tokens is None else (1, part.shape[1], tokens, part.shape[-1])
        return torch.randn(shape, generator=generator, device="cpu").to(part.dtype)

    given = {
        "query": like(asked.query),
        "keys": like(asked.keys, _TRIED_ROOM),
        "values": like(asked.values, _TRIED_ROOM),
    }
    given |= {"sinks": like(asked.sinks), "rotated_query": like(asked.rotated_query)}
    widths = [part.shape[-1] for part in (asked.query, asked.rotated_query) if part is not None]

    def answer(by: Attention, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        parts: Any = {name: None if part is None else part.to(device, dtype) for name, part in given.items()}
        length = torch.tensor([_TRIED_TOKENS], dtype=torch.int64, device=device)
        few = replace(asked, length=length, scaling=sum(widths) ** -0.5, **parts)
        return by.attend(few).cpu().float()

    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            fresh = type(attention)(device)  # which a step has planned nothing with
            fresh.plan(_TRIED_TOKENS)
            found = answer(fresh, device)
    except Exception as error:  # whatever a compiler or driver may raise
        return summary(error)
    wanted = answer(SdpaAttention(host), host, torch.float32)
    off = float((found - wanted).norm() / wanted.norm())
    return None if off <= _WITHIN[asked.query.dtype] else f"its answer for a few tokens is {off:.0%} off"
