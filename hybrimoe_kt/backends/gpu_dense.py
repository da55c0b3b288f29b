"""Who multiplies by dense matrices that lie packed on an accelerator: Triton kernels, or torch piece by piece."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from hybrimoe_kt.device.dense_matrices import DenseMatrices
from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.errors import ConfigError, KernelError, summary, unknown_name
from hybrimoe_kt.kernels.failures import launch_failures
from hybrimoe_kt.quants import TYPES

from .dequantize import dequantize
from .gpu_triton import TritonGpu, target_of

if TYPE_CHECKING:
    from hybrimoe_kt.kernels.workspace import Workspace

__all__ = [
    "GPU_ARITHMETIC",
    "DenseProduct",
    "DenseSpaces",
    "arithmetic_on",
    "can_multiply",
    "check_gpu",
    "product_of",
    "refusal",
    "workspace_bytes",
]

logger = logging.getLogger(__name__)

GPU_ARITHMETIC = ("auto", "triton", "torch", "float")
_Q8_0 = 8
_MOST_MATRICES = 3
"""That one launch of `kernels.linear` takes."""
_MAX_BYTES = 1 << 31
_PIECE_VALUES = 2**22
"""Dequantised at a time by torch; as `weights.lazy` has it."""


class DenseProduct(Protocol):
    """Multiplies by all matrices of a `DenseMatrices`."""

    def __call__(self, given: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """`given [num_tokens, columns]`, or `[num_tokens, heads, columns]` of one matrix with heads.

        Returns `[num_tokens, rows]` in the same dtype, biases added. Nothing waits for the device. With `up` of the
        same shape and dtype, multiplies silu(given) * up.
        """


def check_gpu(name: str) -> None:
    """ConfigError for what no product on an accelerator is computed by."""
    if name not in GPU_ARITHMETIC:
        raise ConfigError(unknown_name("gpu", name, GPU_ARITHMETIC))


def arithmetic_on(device: torch.device, name: str) -> str:
    """Return "triton", "torch" or "float" for what `name` means on `device`; ConfigError where it cannot run there.

    auto: the kernels where they run, torch on an emulated accelerator, which is exact; else floats, because torch
    would dequantise everything for every token.
    """
    if name in ("torch", "float"):
        return name
    reason = TritonGpu.unusable(device)
    if name == "triton":
        if reason is not None:
            raise ConfigError(f"gpu is 'triton', but {reason}; or give auto")
        return name
    if device.type == "cpu":
        return "torch"
    return "float" if reason is not None else "triton"


@functools.cache
def can_multiply(device: torch.device) -> bool:
    """Whether the kernels multiply on a GPU, by trying; a warning says why not.

    Triton builds them when they are first launched, with a C compiler that a machine may lack.
    """
    if TritonGpu.unusable(device) is not None:
        return False
    try:
        data = torch.zeros(34, dtype=torch.uint8, device="cpu")
        matrices = DenseMatrices([PackedWeight((PackedMatrix("a try", data, _Q8_0, 1, 32),))])
        matrices.load(device)
        multiply = _by_kernels(matrices, DenseSpaces(torch.bfloat16), None, 1)
        multiply(torch.ones(1, 32, dtype=torch.bfloat16, device=device)).cpu()
    except Exception as error:  # whatever a compiler or driver may raise
        logger.warning("dense weights become floats on %s, as its kernels cannot be built: %s", device, summary(error))
        return False
    return True


def refusal(weight: PackedWeight, arithmetic: str) -> str | None:
    """Return why a weight has to be floats on the device, None where it can stay as the file has it."""
    if arithmetic == "float":
        return "the device multiplies floats"
    for part in weight.parts if arithmetic == "triton" else ():
        kind = TYPES[part.ggml_type]
        if kind.unit is None:
            return f"{part.name} is {kind.name}, which no GPU kernel reads"
        if part.columns % kind.column_step:
            wanted = f"multiples of {kind.column_step} columns"
            return f"{part.name} has {part.columns} columns of {kind.name}; GPU kernels want {wanted}"
        if len(part.data) >= _MAX_BYTES:
            return f"{part.name} takes {len(part.data)} bytes; GPU kernels address up to {_MAX_BYTES}"
    return None


def workspace_bytes(width: int, dtype: torch.dtype) -> int:
    """What `DenseSpaces` will hold on a device for inputs of up to `width` numbers a token, over all heads."""
    from hybrimoe_kt.kernels.workspace import CHUNK_TOKENS, DECODE_TOKENS, Workspace, quantized_parts

    few = Workspace.bytes_for(quantized_parts(DECODE_TOKENS, width))
    many: int = 2 * CHUNK_TOKENS * width if dtype == torch.float32 else 0
    return max(int(few), many)


class DenseSpaces:
    """One workspace a device for all products there, which take turns."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` of the activations."""
        self.dtype = dtype
        self._wanted: dict[torch.device, int] = {}
        self._made: dict[torch.device, Workspace] = {}

    def want(self, device: torch.device, num_bytes: int) -> None:
        """Note what a product on `device` needs."""
        self._wanted[device] = max(num_bytes, self._wanted.get(device, 0))

    def on(self, device: torch.device) -> Workspace:
        """The workspace, made when it is first asked for, and anew if more has been wanted since."""
        from hybrimoe_kt.kernels.workspace import Workspace

        made = self._made.get(device)
        if made is None or made.memory.numel() < self._wanted[device]:
            made = self._made[device] = Workspace(self._wanted[device], device)
        return made

    def prepare(self) -> None:
        """Allocate all of it, now that every product is known: no step has to."""
        for device in self._wanted:
            self.on(device)


def product_of(
    matrices: DenseMatrices, arithmetic: str, spaces: DenseSpaces, bias: torch.Tensor | None = None, heads: int = 1
) -> DenseProduct:
    """Make what multiplies by loaded `matrices`; `bias` float32 `[rows]` on the device, of one matrix without heads."""
    if arithmetic == "torch":
        return _by_torch(matrices, bias, heads)
    return _by_kernels(matrices, spaces, bias, heads)


def _by_torch(matrices: DenseMatrices, bias: torch.Tensor | None, heads: int) -> DenseProduct:
    """Pieces are dequantised on the device, multiplied in float32 and forgotten: exact, and slow."""

    def rows_of(given: torch.Tensor) -> torch.Tensor:
        first, out = 0, given.new_empty(given.shape[0], matrices.rows, dtype=torch.float32)
        values = given.float()
        for layout in matrices.layouts:
            num_rows = max(1, _PIECE_VALUES // layout.columns)
            for at in range(0, layout.rows, num_rows):
                count = min(num_rows, layout.rows - at)
                piece = matrices.file_rows(layout, at, count)
                floats = dequantize(piece, layout.type.number, (count, layout.columns))
                torch.matmul(values, floats.t(), out=out[:, first + at : first + at + count])
            first += layout.rows
        return out

    def by_head(given: torch.Tensor) -> torch.Tensor:
        (layout,), each = matrices.layouts, matrices.rows // heads
        out = given.new_empty(given.shape[0], heads, each, dtype=torch.float32)
        for head in range(heads):
            piece = matrices.file_rows(layout, head * each, each)
            floats = dequantize(piece, layout.type.number, (each, layout.columns))
            torch.matmul(given[:, head].float(), floats.t(), out=out[:, head])
        return out.flatten(1)

    @torch.no_grad()
    def multiply(given: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        given = given if up is None else functional.silu(given) * up
        out = rows_of(given) if heads == 1 else by_head(given)
        return (out if bias is None else out + bias).to(given.dtype)

    return multiply


def _by_kernels(matrices: DenseMatrices, spaces: DenseSpaces, bias: torch.Tensor | None, heads: int) -> DenseProduct:
    from hybrimoe_kt.kernels.linear import LinearKernels
    from hybrimoe_kt.kernels.tables import code_words
    from hybrimoe_kt.kernels.workspace import CHUNK_TOKENS

    memory, device = matrices.memory, matrices.memory.device
    groups, first = [], 0
    for at in range(0, len(matrices.layouts), _MOST_MATRICES):
        layouts = matrices.layouts[at : at + _MOST_MATRICES]
        rows = sum(layout.rows for layout in layouts)
        part = None if bias is None else bias[first : first + rows]
        groups.append((LinearKernels(target_of(device), memory, code_words(device), layouts, heads, part), first, rows))
        first += rows
    for kernels, _, _ in groups:
        spaces.want(device, kernels.workspace_bytes(CHUNK_TOKENS, spaces.dtype))

    def multiply(given: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        is_apart = len(groups) == 1 and groups[0][0].takes_apart(given)
        if up is not None and not (is_apart and given.dtype == spaces.dtype and groups[0][0].takes_apart(up)):
            given, up = functional.silu(given) * up, None
        if given.dtype == torch.float32 and spaces.dtype != torch.float32:  # for which no room was wanted
            return multiply(given.to(spaces.dtype)).float()
        space = spaces.on(device)
        out = given.new_empty(given.shape[0], matrices.rows)
        if not len(given):
            return out
        if not is_apart:
            given = given.contiguous()
            given = given.clone() if given.data_ptr() % 16 else given
        try:
            with _current(device):
                if len(groups) == 1:
                    opaque(functools.partial(groups[0][0].multiply, space, given, out, up))
                    return out
                for kernels, begin, rows in groups:
                    part = given.new_empty(given.shape[0], rows)
                    opaque(functools.partial(kernels.multiply, space, given, part))
                    out[:, begin : begin + rows] = part
        except launch_failures() as error:
            raise KernelError(
                f"Triton cannot multiply by dense weights: {summary(error)}; --gpu_backend torch does without it"
            ) from error
        return out

    return multiply


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
