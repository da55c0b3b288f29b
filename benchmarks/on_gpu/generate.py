"""Models of random blocks, written in seconds: tensors are filled from pools, by threads, into the mapped file.

`tests.support.generated_model` draws and quantises every value, minutes for a released model's size; its tables of
tensors serve here as well. Every block is valid and every value finite; what the model says means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter

from tests.support.generated_builder import Builder
from tests.support.generated_metadata import Shape, write_metadata
from tests.support.generated_model import LAYERS
from tests.support.random_blocks import Type, random_blocks

__all__ = ["file_bytes", "write_model"]

PIECE_BYTES = 1 << 24
"""Filled at once by a thread; every piece begins at another row of its pool."""
POOL_BYTES = {True: 1 << 26, False: 1 << 22}
"""Whether a type is drawn as bytes (K-quants) or quantised in Python -> how much of it is made."""
_K_QUANTS = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
"""What a Q4_K_M file has in their place where rows are no multiple of 256."""


class _Tensor(NamedTuple):
    name: str
    size: tuple[int, ...]
    kind: Type
    centre: float = 0.0
    scale: float = 0.0

    @property
    def row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.size[-1] // block * block_bytes

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.size[:-1])) * self.row_bytes


class _Tensors(Builder):
    """Notes the tensors that a family's model has, instead of drawing them; types as in a Q4_K_M file."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.keep_state = shape, False
        self.found: list[_Tensor] = []

    def dense(
        self, hf_name: str, gguf_name: str, *size: int, scale: float | None = None, centre: float = 0.0,
        stored: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:  # fmt: skip
        self.found.append(_Tensor(gguf_name, size, _dense_kind(gguf_name, size), centre, scale or size[-1] ** -0.5))
        return _nothing(size)

    def draw(self, *size: int, scale: float | None = None) -> np.ndarray:
        return _nothing(size)

    def write(self, gguf_name: str, value: np.ndarray) -> None:
        self.found.append(_Tensor(gguf_name, value.shape, _fitting(Type.Q6_K, value.shape[-1])))

    def remember(self, hf_name: str, value: np.ndarray) -> None:
        """Nobody asks for it."""

    def experts(self, layer: int) -> None:
        shape = self.shape
        gate, up, down = shape.types
        if layer % 2:
            down = {Type.Q4_K: Type.Q6_K, Type.Q5_0: Type.Q8_0}.get(down, down)
        for role, kind in (("gate", gate), ("up", up)):
            self.found.append(
                _Tensor(f"blk.{layer}.ffn_{role}_exps.weight", (shape.experts, shape.inter, shape.hidden), kind)
            )
        self.found.append(
            _Tensor(f"blk.{layer}.ffn_down_exps.weight", (shape.experts, shape.hidden, shape.inter), down)
        )


def _nothing(size: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.float32(0), size)


def _dense_kind(name: str, size: tuple[int, ...]) -> Type:
    if len(size) < 2 or "ffn_gate_inp" in name:
        return Type.F32
    better = name == "output.weight" or "attn_v" in name or "ffn_down" in name
    return _fitting(Type.Q6_K if better else Type.Q4_K, size[-1])


def _fitting(kind: Type, columns: int) -> Type:
    return kind if columns % GGML_QUANT_SIZES[kind][0] == 0 else _FALLBACK[kind]


def _tensors(shape: Shape) -> list[_Tensor]:
    build = _Tensors(shape)
    build.dense("", "token_embd.weight", shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        LAYERS[shape.architecture](build, layer)
    build.norm("", "output_norm.weight", shape.hidden)
    build.dense("", "output.weight", shape.vocab, shape.hidden)
    return build.found


def file_bytes(shape: Shape) -> int:
    """How large the file of `shape` will be, but for its metadata."""
    return sum(tensor.num_bytes for tensor in _tensors(shape))


def write_model(shape: Shape, path: Path, pool_bytes: dict[bool, int] | None = None) -> int:
    """Write a random model of `shape` to `path`; return its size in bytes."""
    tensors = _tensors(shape)
    starts = _lay_out(shape, path, tensors)
    rng = np.random.default_rng(shape.seed)
    file = np.memmap(path, mode="r+", dtype=np.uint8)
    jobs = []
    pools: dict[tuple[Type, int], np.ndarray] = {}
    for tensor in tensors:
        view = file[starts[tensor.name] : starts[tensor.name] + tensor.num_bytes]
        if tensor.kind == Type.F32:
            value = tensor.centre + tensor.scale * rng.standard_normal(tensor.size)
            view[:] = value.astype(np.float32).reshape(-1).view(np.uint8)
            continue
        key = tensor.kind, tensor.size[-1]
        if key not in pools:
            pools[key] = _pool(rng, tensor, pool_bytes or POOL_BYTES)
        jobs += list(_pieces(view, pools[key], tensor.row_bytes, rng))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        list(threads.map(_fill, jobs))
    return path.stat().st_size


def _lay_out(shape: Shape, path: Path, tensors: list[_Tensor]) -> dict[str, int]:
    """Write everything but the tensors' values, and make the file as long as it will be; return where each begins."""
    writer = GGUFWriter(str(path), shape.architecture)
    write_metadata(writer, shape)
    for tensor in tensors:
        if tensor.kind == Type.F32:
            writer.add_tensor_info(tensor.name, tensor.size, np.dtype(np.float32), tensor.num_bytes)
        else:
            raw = (*tensor.size[:-1], tensor.row_bytes)
            writer.add_tensor_info(tensor.name, raw, np.dtype(np.uint8), tensor.num_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "just opened"
    out: Any = writer.fout[0]
    writer.write_padding(out, out.tell())
    starts, at, step = {}, out.tell(), writer.data_alignment
    for tensor in tensors:
        starts[tensor.name] = at
        at += -(-tensor.num_bytes // step) * step
    out.truncate(at)
    writer.close()
    return starts


def _pool(rng: np.random.Generator, tensor: _Tensor, pool_bytes: dict[bool, int]) -> np.ndarray:
    rows = max(1, pool_bytes[tensor.kind in _K_QUANTS] // tensor.row_bytes)
    return random_blocks(rng, tensor.kind, rows, tensor.size[-1]).reshape(-1)


def _pieces(
    view: np.ndarray, pool: np.ndarray, row: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    step = max(1, PIECE_BYTES // row) * row
    for begin in range(0, len(view), step):
        yield view[begin : begin + step], pool, int(rng.integers(0, len(pool) // row)) * row


def _fill(job: tuple[np.ndarray, np.ndarray, int]) -> None:
    view, pool, shift = job
    at = 0
    while at < len(view):
        part = pool[shift:][: len(view) - at]
        view[at : at + len(part)] = part
        at, shift = at + len(part), 0
