"""Step 3, second half: linear layers of few tokens beside the bandwidth of a copy, at DeepSeek-V3's shapes.

Each launch in the graph multiplies with a matrix of its own, more of them than the L2 cache holds.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from hybrimoe_kt.device.layout import MatrixLayout
from hybrimoe_kt.errors import summary
from hybrimoe_kt.kernels.tables import code_words
from hybrimoe_kt.kernels.workspace import Workspace
from hybrimoe_kt.quants import kernel_types, row_bytes
from tests.support.random_blocks import Type, random_blocks

from .plan import Plan
from .results import Results
from .timing import captured, host_s, on_device_s

__all__ = ["SHAPES", "TINY", "Work", "measure", "run"]

STEP, TABLE = "kernels", "linears"
SHAPES = {"q_b": (24_576, 1536), "o_proj": (7168, 16_384), "lm_head / 8": (16_160, 7168)}
"""Name -> rows, columns."""
TINY = {"tiny": (72, 256)}
QUICK = (Type.Q4_K, Type.Q6_K, Type.Q8_0)
BEYOND_CACHE_BYTES = 512 << 20
DRAWN_ROWS = 64
"""Random rows, of which the others are copies: as good for timing, and made in no time."""


def run(plan: Plan, results: Results, device: torch.device, bandwidth: float, ends_s: float) -> None:
    """A row for every number of tokens, shape and type."""
    kinds = [Type(row.number) for row in kernel_types()]
    shapes, counts, bytes_wanted = SHAPES, (1, 8), BEYOND_CACHE_BYTES
    if plan.is_emulated:
        kinds, shapes, counts, bytes_wanted = [Type.Q4_K], TINY, (1, 2), 0
    elif plan.quick:
        kinds, counts = list(QUICK), (1,)
    for num_tokens in counts:
        for shape_name, shape in shapes.items():
            for kind in kinds:
                name = f"{shape_name}, {kind.name}, {num_tokens} token{'s' * (num_tokens > 1)}"
                if time.monotonic() > ends_s:
                    results.leave_out(STEP, TABLE, name, "out of time")
                    continue
                try:
                    found = measure(Work(kind, *shape, num_tokens, device, bytes_wanted), bandwidth)
                except Exception as error:  # the rest may do
                    results.fail(STEP, TABLE, name, summary(error))
                    continue
                results.add(STEP, TABLE, name, found)


class Work:
    """One launch with each of as many equal matrices as fill `bytes_wanted`, at least two."""

    def __init__(
        self, kind: Type, rows: int, columns: int, num_tokens: int, device: torch.device, bytes_wanted: int
    ) -> None:
        from hybrimoe_kt.backends.gpu_triton import target_of
        from hybrimoe_kt.kernels.linear import LinearKernels

        self.device, self.matrix_bytes = device, rows * row_bytes(int(kind), columns)
        drawn = torch.from_numpy(random_blocks(np.random.default_rng(0), kind, min(rows, DRAWN_ROWS), columns))
        data = drawn.to(device)[torch.arange(rows, device=device) % len(drawn)].flatten()
        step = MatrixLayout.at(0, int(kind), rows, columns).end_bytes
        layouts = [
            MatrixLayout.at(number * step, int(kind), rows, columns) for number in range(max(2, bytes_wanted // step))
        ]
        memory = torch.empty(step * len(layouts), dtype=torch.uint8, device=device)
        for layout in layouts:
            layout.write(data, memory)
        target, tables = target_of(device), code_words(device)
        self.layers = [LinearKernels(target, memory, tables, (layout,)) for layout in layouts]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._x = torch.randn(num_tokens, columns, device=device).to(dtype)
        self._out = torch.empty(num_tokens, rows, dtype=dtype, device=device)
        self._space = Workspace(self.layers[0].workspace_bytes(num_tokens, dtype), device)

    def __call__(self) -> None:
        for layer in self.layers:
            layer.multiply(self._space, self._x, self._out)


def measure(work: Work, bandwidth: float) -> dict[str, Any]:
    """Microseconds of one layer, rounding its input to int8 included, and the rate its weights are read at."""
    work()  # compiles
    is_card, num_layers = work.device.type == "cuda", len(work.layers)
    host = host_s(work, work.device, 3 if is_card else 1) / num_layers
    seconds = on_device_s(captured(work) if is_card else work, work.device, 15 if is_card else 1) / num_layers
    return {
        "us": seconds * 1e6, "host_us": host * 1e6, "gb_per_s": work.matrix_bytes / seconds / 1e9,
        "of_copy": work.matrix_bytes / seconds / bandwidth,
    }  # fmt: skip
