"""The launches of linear layers that share their input; nothing here waits, allocates or looks at a tensor's values."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .configs import FewConfig, few_config, many_config, quantize_config, shares_weights
from .linear_few import linear_few
from .linear_many import linear_many
from .quantize_rows import quantize_rows
from .targets import Target
from .workspace import CHUNK_TOKENS, DECODE_TOKENS, MatrixInSlot, Parts, Workspace, quantized_parts

__all__ = ["MAX_MATRIX_BYTES", "LinearKernels"]

MAX_MATRIX_BYTES = 1 << 31
"""Places within a matrix are 32-bit; where it begins is not, so a larger one can be laid out as two, some rows each."""
_STEP = 8
"""Numbers; the distance of rows that lie apart is a multiple."""
MAX_WIDTH = 1 << 24
"""So are places within a block of up to 128 tokens' inputs or answers."""


@dataclass(frozen=True, slots=True)
class LinearKernels:
    """Up to three matrices `[rows, columns]` in `memory`, uint8 `[num_bytes]` from a multiple of 16 bytes on.

    `tables` is `code_words` of its device, `bias` float32 `[total_rows]`. With more than one head there is one matrix,
    whose rows are as many groups: each is multiplied with its own head of x. ValueError for what no kernel does.
    """

    target: Target
    memory: torch.Tensor
    tables: torch.Tensor
    matrices: tuple[MatrixInSlot, ...]
    heads: int = 1
    bias: torch.Tensor | None = None
    total_rows: int = field(init=False)
    columns: int = field(init=False)
    _few: tuple[FewConfig, ...] = field(init=False, repr=False)
    """By number of tokens, from 1."""

    def __post_init__(self) -> None:
        _check(self.memory, self.matrices, self.heads, self.bias)
        columns, rows = self.matrices[0].columns, sum(matrix.rows for matrix in self.matrices)
        units = max(columns // matrix.type.unit.values for matrix in self.matrices if matrix.type.unit)
        several = shares_weights([matrix.type.number for matrix in self.matrices])
        few = tuple(few_config(self.target, rows, units, 1 + more * several) for more in range(DECODE_TOKENS))
        for name, value in (("total_rows", rows), ("columns", columns), ("_few", few)):
            object.__setattr__(self, name, value)

    def multiply(self, space: Workspace, x: torch.Tensor, out: torch.Tensor, up: torch.Tensor | None = None) -> None:
        """Write the products with `x [T, columns]` or `[T, heads, columns]` to `out [T, total_rows]`.

        The matrices' rows stand one after the other. Both contiguous from a multiple of 16 bytes on, of any of float32,
        float16 and bfloat16; `space` has `workspace_bytes`. More tokens than DECODE_TOKENS are multiplied as they are,
        float32 as float16. Where `takes_apart` x may be in parts; and so may `up` of the same shape and dtype: then the
        products are with silu(x) * up.
        """
        if x.shape[0] <= DECODE_TOKENS:
            self._few_tokens(space, x, out, up)
        elif x.dtype != torch.float32:
            self._many_tokens(x, out)
        else:
            for rows, answers in zip(x.split(CHUNK_TOKENS), out.split(CHUNK_TOKENS), strict=True):
                half = space.carve(self._half_parts(rows.shape[0]))["x"]
                self._many_tokens(half.copy_(rows.flatten(1)), answers)

    def takes_apart(self, x: torch.Tensor) -> bool:
        """Whether x is only read to be quantised, so that its rows need not be one piece."""
        if x.shape[0] > DECODE_TOKENS or any(matrix.type.is_float for matrix in self.matrices):
            return False
        return x.stride(-1) == 1 and not any(step % _STEP for step in x.stride()[:-1])

    def _few_tokens(self, space: Workspace, x: torch.Tensor, out: torch.Tensor, up: torch.Tensor | None) -> None:
        if self._is_float:
            rows = self.tables, self.tables, self.tables  # not read
        else:
            part = space.quantized(x.shape[0] * self.heads, self.columns)
            rows = part["xq"], part["xs"], part["xm"]
            further = up if up is None else up.flatten(0, -2)
            quantize_rows(x.flatten(0, -2), *rows, quantize_config(self.target), up=further)
        config = self._few[x.shape[0] - 1]
        linear_few(self.memory, self.tables, self.matrices, self.heads, x, rows, self.bias, out, config)

    def _many_tokens(self, x: torch.Tensor, out: torch.Tensor) -> None:
        first = 0
        for matrix in self.matrices:
            config = many_config(self.target, self.heads, matrix.rows // self.heads, x.shape[0])
            bias = self.bias if self.bias is None else self.bias[first : first + matrix.rows]
            part = out[:, first : first + matrix.rows]
            linear_many(self.memory, self.tables, matrix, self.heads, x, bias, part, config)
            first += matrix.rows

    def parts(self, num_tokens: int, dtype: torch.dtype) -> Parts:
        """What `multiply` writes between its kernels for x of `dtype`: shape and dtype by name."""
        if num_tokens <= DECODE_TOKENS:
            return {} if self._is_float else quantized_parts(num_tokens * self.heads, self.columns)
        return self._half_parts(min(num_tokens, CHUNK_TOKENS)) if dtype == torch.float32 else {}

    def _half_parts(self, num_tokens: int) -> Parts:
        return {"x": ((num_tokens, self.heads * self.columns), torch.float16)}

    def workspace_bytes(self, max_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of a Workspace that suffices for up to `max_tokens`; one for all layers has the largest of theirs."""
        counts = min(max_tokens, DECODE_TOKENS), max_tokens
        return max(Workspace.bytes_for(self.parts(num_tokens, dtype)) for num_tokens in counts)

    @property
    def _is_float(self) -> bool:
        return all(matrix.type.is_float for matrix in self.matrices)


def _check(memory: torch.Tensor, matrices: tuple[MatrixInSlot, ...], heads: int, bias: torch.Tensor | None) -> None:
    if not 1 <= len(matrices) <= 3 or (heads != 1 and len(matrices) > 1):
        raise ValueError(f"{len(matrices)} matrices with {heads} heads, valid: one to three, or one with heads")
    columns, total_rows = matrices[0].columns, sum(matrix.rows for matrix in matrices)
    for matrix in matrices:
        kind, num_bytes = matrix.type, matrix.rows * matrix.columns * matrix.type.bytes_per_value
        if kind.unit is None:
            raise ValueError(f"no GPU kernel reads {kind.name}")
        if matrix.columns != columns or columns % kind.column_step:
            wanted = f"the first's {columns}, a multiple of {kind.column_step}"
            raise ValueError(f"a {kind.name} matrix has {matrix.columns} columns, valid: {wanted}")
        if num_bytes >= MAX_MATRIX_BYTES:
            raise ValueError(f"a {kind.name} matrix takes {num_bytes:.0f} bytes; lay it out as two, some rows each")
        if heads < 1 or matrix.rows % heads:
            raise ValueError(f"{matrix.rows} rows cannot be divided among {heads} heads")
    if max(heads * columns, total_rows) >= MAX_WIDTH:
        raise ValueError(f"{heads} x {columns} inputs and {total_rows} answers a token, valid: less than {MAX_WIDTH}")
    if memory.dtype != torch.uint8 or memory.dim() != 1 or memory.stride(0) != 1 or memory.data_ptr() % 16:
        raise ValueError("memory must be contiguous uint8 [num_bytes] from a multiple of 16 bytes on")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (total_rows,) or not bias.is_contiguous()):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}, wanted contiguous float32 [{total_rows}]")
