"""What quantised safetensors hold, in GGUF's blocks: MXFP4 in another order, and FP8 with a scale for each block.

MXFP4 after the OCP Microscaling Formats specification 1.0; FP8 as DeepSeek-V3 published it: `F8_E4M3` numbers, and
beside them `weight_scale_inv`, a factor for every 128 by 128 of them.
"""

from __future__ import annotations

import torch

__all__ = ["MXFP4_VALUES", "Q8_0_VALUES", "mxfp4_blocks", "q8_0_blocks", "scaled"]

MXFP4_VALUES = Q8_0_VALUES = 32
"""Values of a block."""
_LARGEST = 127


def mxfp4_blocks(numbers: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return GGUF's MXFP4, uint8 `[..., blocks, 17]`, the same values.

    `numbers` uint8 `[..., blocks, 16]` has two neighbours in a byte, the first of them below; GGUF has there a value of
    the block's first half and one of its second. `exponents` uint8 `[..., blocks]`.
    """
    values = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(-2)  # [..., blocks, 32], in order
    first, second = values.split(MXFP4_VALUES // 2, dim=-1)
    return torch.cat((exponents[..., None], first | second << 4), dim=-1)


def q8_0_blocks(values: torch.Tensor) -> torch.Tensor:
    """Return GGUF's Q8_0, uint8 `[..., columns / 32 * 34]`, of float values `[..., columns]`."""
    blocks = values.float().unflatten(-1, (-1, Q8_0_VALUES))
    scales = (blocks.abs().amax(-1, keepdim=True) / _LARGEST).half()
    divisors = torch.where(scales > 0, scales.float(), torch.inf)  # by what is kept, not by what it rounds
    numbers = (blocks / divisors).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return torch.cat((scales.view(torch.uint8), numbers.view(torch.uint8)), dim=-1).flatten(-2)


def scaled(numbers: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return float32 values of a matrix, or of several `[..., rows, columns]`, with a scale for each block.

    `scales` of one value, or a matrix: of as many rows and columns as there are blocks; the last ones may be cut.
    """
    values, scales = numbers.float(), scales.float()
    if scales.numel() == 1:
        return values.mul_(scales.view(()))
    rows, columns = values.shape[-2:]
    for dim, size in ((-2, block[0]), (-1, block[1])):
        scales = scales.repeat_interleave(size, dim)
    return values.mul_(scales[..., :rows, :columns])
