"""Which models are generated: dimensions of released ones, as many of their layers as this machine has room for."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.support.generated_metadata import Shape
from tests.support.random_blocks import Type

from .generate import file_bytes
from .plan import Plan

__all__ = ["Chosen", "choose", "full_shape", "tiny_shape"]

_FULL = {
    "qwen3-30b-a3b": Shape(
        architecture="qwen3moe", layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8,
        inter=768, context=40960, types=(Type.Q4_K, Type.Q4_K, Type.Q4_K), unused_tokens=151936 - 261,
    ),
    "deepseek-v2-lite": Shape(
        architecture="deepseek2", layers=27, hidden=2048, heads=16, kv_heads=16, head_dim=128, experts=64, top_k=6,
        inter=1408, dense_inter=10944, dense_layers=1, shared_experts=2, kv_lora_rank=512, rope_dim=64, context=32768,
        types=(Type.Q4_K, Type.Q4_K, Type.Q5_0), unused_tokens=102400 - 261,
    ),
    "mixtral-8x7b": Shape(
        architecture="llama", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, experts=8, top_k=2,
        inter=14336, context=32768, types=(Type.Q4_K, Type.Q4_K, Type.Q4_K), unused_tokens=32000 - 261,
    ),
}  # fmt: skip
_HOST_COPIES = {"deepseek-v2-lite": 2.2}
"""RAM in files' sizes: DeepSeek's experts are padded for the CPU, so it has a copy beside the file's pages."""
_LEAST_LAYERS = 2
_ROOM = 1.3
_BYTES_PER_S = 2e8
"""Of a file for every second that a model may take: writing and loading it then take less than half. An assumption."""
_OTHER_RAM = 6e9
"""For the program, its libraries and the dense weights on their way to the card."""


class Chosen(NamedTuple):
    """What to generate, where, and what to tell of it."""

    shape: Shape
    path: Path
    note: str


def full_shape(model: str) -> Shape:
    """The released model's dimensions."""
    return _FULL[model]


def tiny_shape(model: str) -> Shape:
    """The same architecture, so small that a CPU answers in milliseconds."""
    is_deepseek = "deepseek" in model
    return replace(
        _FULL[model], layers=3 if is_deepseek else 2, hidden=256, heads=4, kv_heads=4 if is_deepseek else 2,
        head_dim=64, experts=8, top_k=2, inter=256, dense_inter=512, kv_lora_rank=64, rope_dim=32, context=1024,
        unused_tokens=200,
    )  # fmt: skip


def choose(plan: Plan, model: str, ram_bytes: int, left_s: float) -> Chosen | str:
    """What of `model` fits in `ram_bytes`, in some folder and in `left_s` seconds, or why nothing does."""
    file = f"on-gpu-{os.getpid()}-{model}.gguf"
    out = Path(plan.out)
    if plan.is_emulated:
        return Chosen(tiny_shape(model), out / file, "tiny")
    shape = _FULL[model]
    folder, free = _folder(plan, file_bytes(shape), ram_bytes)
    copies = max(_ROOM, _HOST_COPIES.get(model, 0.0)) + (1.0 if folder != out else 0.0)
    room = min((ram_bytes - _OTHER_RAM) / copies, 0.95 * free, left_s * _BYTES_PER_S)
    least = _LEAST_LAYERS + (shape.dense_layers if shape.architecture == "deepseek2" else 0)
    fitting = (n for n in range(shape.layers, least - 1, -1) if file_bytes(replace(shape, layers=n)) <= room)
    layers = next(fitting, 0)
    if not layers:
        found = f"{ram_bytes / 1e9:.0f} GB of RAM, {free / 1e9:.0f} GB in {folder}, {left_s:.0f} s"
        return f"no room or no time for {least} layers: there are {found}"
    if layers == shape.layers:
        return Chosen(shape, folder / file, f"all {layers} layers")
    if shape.architecture == "deepseek2":  # llama.cpp takes every file of other than 27 layers for the large model
        shape = replace(shape, q_lora_rank=1536)
    times = shape.layers / layers
    few = f"{layers} of {shape.layers} layers, for want of room or time"
    note = f"{few}: with all of them a token takes {times:.1f} times as long"
    return Chosen(replace(shape, layers=layers), folder / file, note)


def _folder(plan: Plan, num_bytes: int, ram_bytes: int) -> tuple[Path, int]:
    """RAM if there is plenty, as writing to a disk takes longer than all measurements; else the output folder."""
    memory = Path("/dev/shm")
    if not plan.keep_model and memory.is_dir() and os.access(memory, os.W_OK):
        free = shutil.disk_usage(memory).free
        if free > 1.1 * num_bytes and ram_bytes > 3.3 * num_bytes + _OTHER_RAM:
            return memory, free
    return Path(plan.out), shutil.disk_usage(plan.out).free
