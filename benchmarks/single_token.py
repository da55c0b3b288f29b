"""What presenting a single token twice is worth on kt-kernel's llamafile experts.

    python -m benchmarks.single_token

Alternates one-row and two-row calls on the same experts (weights beyond the last-level cache, one thread) and
prints the median time of each and their ratio. The second row has weights 0, so the results are the same.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from hybrimoe_kt.backends.cpu_llamafile import LlamafileBackend
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from tests.support.generated_model import Type, random_blocks

SHAPES = {"DeepSeek-V2-Lite (1408 padded to 1536)": (2048, 1408, 64, 6), "Qwen3-30B-A3B": (2048, 768, 128, 8)}
CALLS = 60


def layer(hidden: int, inter: int, experts: int, top_k: int) -> LayerExperts:
    random = np.random.default_rng(0)

    def matrix(kind: Type, rows: int, columns: int) -> ExpertMatrix:
        raw = random_blocks(random, kind, experts * rows, columns).reshape(experts, -1)
        return ExpertMatrix(torch.from_numpy(np.ascontiguousarray(raw)), int(kind), rows, columns)

    down = Type.Q4_K if inter % 256 == 0 else Type.Q5_0
    gate, up = matrix(Type.Q4_K, inter, hidden), matrix(Type.Q4_K, inter, hidden)
    return LayerExperts(0, experts, top_k, hidden, inter, gate, up, matrix(down, hidden, inter))


def measure(hidden: int, inter: int, experts: int, top_k: int) -> tuple[float, float]:
    """Median seconds of a one-row and of a two-row call."""
    backend = LlamafileBackend(1, 16)
    backend.add_layer(layer(hidden, inter, experts, top_k))
    generator = torch.Generator().manual_seed(0)
    times: dict[int, list[float]] = {1: [], 2: []}
    for call in range(2 * CALLS):
        rows = 1 + call % 2
        ids = torch.randperm(experts, generator=generator)[None, :top_k]
        backend._buffers.fill_single(torch.randn(1, hidden, generator=generator), ids, torch.rand(1, top_k))
        times[rows].append(_seconds(backend, rows, top_k))
    return statistics.median(times[1]), statistics.median(times[2])


def _seconds(backend: LlamafileBackend, rows: int, top_k: int) -> float:
    began = time.perf_counter()
    backend.start_rows(0, rows, top_k)
    backend._pool.sync()
    return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'experts':<40}{'one row':>10}{'two rows':>10}{'ratio':>8}   (ms per expert)")
    for name, (hidden, inter, experts, top_k) in SHAPES.items():
        one, two = measure(hidden, inter, experts, top_k)
        print(f"{name:<40}{one / top_k * 1e3:>10.3f}{two / top_k * 1e3:>10.3f}{one / two:>8.2f}")


if __name__ == "__main__":
    main()
