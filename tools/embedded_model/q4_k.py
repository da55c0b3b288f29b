"""Q4_K quantisation: 256 weights as 8 blocks of 32, each ``scale * q - minimum`` with 4-bit q, both in 6 bits.

The format is llama.cpp's; gguf-py reads it and does not write it. Scales are chosen by a search over candidates with a
least-squares fit for each, weights of larger size counting more, as an output depends on them more.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BLOCK, SUB = 256, 32
Floats = npt.NDArray[np.float32]


def quantize(weights: Floats) -> npt.NDArray[np.uint8]:
    """``[..., columns]`` with columns a multiple of 256, as bytes ``[..., columns / 256 * 144]``."""
    if weights.shape[-1] % BLOCK:
        raise ValueError(f"Q4_K needs rows of a multiple of {BLOCK} weights, these have {weights.shape[-1]}")
    blocks = weights.astype(np.float32).reshape(-1, BLOCK // SUB, SUB)
    scales, minima = fit(blocks)
    top_scale, top_minimum = scales.max(1) / 63, minima.max(1) / 63
    d, dmin = top_scale.astype(np.float16), top_minimum.astype(np.float16)
    coded_scales = _coded(scales, d.astype(np.float32))
    coded_minima = _coded(minima, dmin.astype(np.float32))
    scale = (d.astype(np.float32)[:, None] * coded_scales)[..., None]
    minimum = (dmin.astype(np.float32)[:, None] * coded_minima)[..., None]
    quants = np.clip(np.rint((blocks + minimum) / np.where(scale > 0, scale, 1)), 0, 15).astype(np.uint8)
    quants[np.broadcast_to(scale <= 0, quants.shape)] = 0
    packed = np.concatenate(
        [
            d[:, None].view(np.uint8),
            dmin[:, None].view(np.uint8),
            _pack_scales(coded_scales, coded_minima),
            _pack(quants),
        ],
        axis=1,
    )
    return packed.reshape(*weights.shape[:-1], -1)


def fit(blocks: Floats, candidates: int = 24) -> tuple[Floats, Floats]:
    """Scale and minimum (both >= 0) of every 32 weights, ``[blocks, 8]`` each."""
    importance = np.sqrt((blocks**2).mean(-1, keepdims=True)) + np.abs(blocks)
    low = np.minimum(blocks.min(-1), 0)
    high = blocks.max(-1)
    span = np.maximum(high - low, 1e-12)
    best_scale, best_minimum, best_error = span / 15, -low, np.full(low.shape, np.inf, np.float32)
    for step in range(candidates + 1):
        inverse = (14.2 + 1.8 * step / candidates) / span
        q = np.clip(np.rint(inverse[..., None] * (blocks - low[..., None])), 0, 15)
        scale, minimum = _least_squares(blocks, q, importance)
        error = (importance * (scale[..., None] * q - minimum[..., None] - blocks) ** 2).sum(-1)
        better = error < best_error
        best_scale = np.where(better, scale, best_scale)
        best_minimum = np.where(better, minimum, best_minimum)
        best_error = np.where(better, error, best_error)
    return best_scale.astype(np.float32), best_minimum.astype(np.float32)


def _least_squares(x: Floats, q: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """The scale and minimum that fit ``x`` best for given ``q``; a negative minimum becomes 0.

    Where all ``q`` are one number, both cannot be told apart: the scale alone does it, or the minimum where they are 0.
    """
    w, wq, wx = weight.sum(-1), (weight * q).sum(-1), (weight * x).sum(-1)
    wqq, wqx = (weight * q * q).sum(-1), (weight * q * x).sum(-1)
    determinant = w * wqq - wq * wq
    safe = np.where(determinant > 0, determinant, 1)
    clear = determinant > 1e-6 * w * wqq
    scale = (w * wqx - wx * wq) / safe
    minimum = (wq * wqx - wqq * wx) / safe
    alone = np.maximum(wqx / np.where(wqq > 0, wqq, 1), 0)
    offset = np.where(wqq > 0, 0, np.maximum(-wx / np.maximum(w, 1e-30), 0))
    together = clear & (minimum >= 0)
    return np.where(together, np.maximum(scale, 0), alone), np.where(together, minimum, offset)


def _coded(values: Floats, unit: Floats) -> npt.NDArray[np.uint8]:
    return np.clip(np.rint(values / np.where(unit > 0, unit, 1)[:, None]), 0, 63).astype(np.uint8)


def _pack_scales(scales: npt.NDArray[np.uint8], minima: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Eight 6-bit scales and minima in 12 bytes: the last four of each are split into low and high bits."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    third = (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _pack(quants: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Two neighbouring blocks of 32 share 32 bytes: the first in the low halves, the second in the high ones."""
    pairs = quants.reshape(len(quants), 4, 2, SUB)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(quants), -1)
