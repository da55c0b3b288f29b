"""Experts brought by the cores: no copy engine takes a source that only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hybrimoe_kt.kernels.plan_configs import FetchConfig
from hybrimoe_kt.kernels.plan_tables import SlotAddresses

__all__ = ["fetch", "fetch_kernel"]


@triton.jit
def fetch_kernel(copies, sources, targets, slot_bytes, place, LAYERED: tl.constexpr, WORDS: tl.constexpr):
    """Program (part, copy): every `num_programs(0)`-th piece of WORDS words of one expert."""
    columns: tl.constexpr = 4 if LAYERED else 3
    copy = copies + tl.program_id(1) * columns
    layer = place
    if LAYERED:
        layer = tl.load(copy)
        copy += 1
    expert = tl.load(copy)
    if expert < 0:
        return
    slot = tl.load(copy + 1)
    size = tl.load(slot_bytes + layer)
    source = (tl.load(sources + layer) + expert.to(tl.int64) * size).to(tl.pointer_type(tl.int32))
    target = (tl.load(targets + layer) + slot.to(tl.int64) * size).to(tl.pointer_type(tl.int32))
    source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
    word = tl.arange(0, WORDS)  # [WORDS]
    num_pieces, part = size // (4 * WORDS), tl.program_id(0)
    for piece in range(part.to(tl.int64), num_pieces, tl.num_programs(0)):
        tl.store(target + piece * WORDS + word, tl.load(source + piece * WORDS + word))
    if part == num_pieces % tl.num_programs(0):
        rest = size // 16 * 4 - num_pieces * WORDS  # counted so that the compiler sees whole 16 bytes
        inside = word < rest
        tl.store(
            target + num_pieces * WORDS + word, tl.load(source + num_pieces * WORDS + word, mask=inside), mask=inside
        )


def fetch(copies: torch.Tensor, addresses: SlotAddresses, config: FetchConfig, place: int = 0) -> None:
    """Bring experts into slots. `copies` int32 `[N, 3]`: expert, slot and number, into the layer `place`; or `[N, 4]`,
    the layer's place first. Rows with an expert below 0 are passed over. `land` says that they are through.
    """
    number, columns = copies.shape
    fetch_kernel[(config.programs, number)](
        copies,
        addresses.sources,
        addresses.targets,
        addresses.slot_bytes,
        place,
        LAYERED=columns == 4,
        WORDS=config.words,
        num_warps=config.num_warps,
    )
