"""One MoE layer's experts on a GPU: our kernels beside the roofline and beside dequantise-then-multiply.

    python -m benchmarks.gpu_kernels
    python -m benchmarks.gpu_kernels --models qwen3-30b-a3b --tokens 1 8 512

Every expert is in a slot; routing is drawn anew for every run, so that decode finds its weights in DRAM rather than
in the L2 cache. Decode steps are replayed from a CUDA graph. Times are medians over `--rounds`, on the GPU's clock;
the roofline is the weights' bytes over the bandwidth that a large copy reaches on this GPU in the same process, or
the multiply-adds over its published tensor-core rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu_roofline import expert_bytes, mixes_of, roofline
from benchmarks.random_blocks import Type, random_blocks
from hybrimoe_kt.backends.gpu_torch import TorchGpu
from hybrimoe_kt.backends.gpu_triton import TritonGpu, _target_of
from hybrimoe_kt.device.backend import GpuBackend
from hybrimoe_kt.device.host_store import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.sim.models import MODELS, ModelSpec

Kinds = tuple[int, int, int]
DECODE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds of one layer."""

    kernels_s: float
    torch_s: float
    roofline_s: float

    @property
    def of_roofline(self) -> float:
        return self.roofline_s / self.kernels_s

    @property
    def over_torch(self) -> float:
        return self.torch_s / self.kernels_s


@dataclass(frozen=True, slots=True)
class Layer:
    """All experts of a layer in slots: expert e in slot e."""

    experts: LayerExperts
    layout: SlotLayout
    memory: torch.Tensor
    slot_of: torch.Tensor

    @property
    def slots(self) -> list[tuple[int, int]]:
        return [(expert, expert) for expert in range(self.experts.num_experts)]


def make_layer(spec: ModelSpec, kinds: Kinds, device: torch.device) -> Layer:
    """One random expert, copied into every slot: as good for timing, and made in seconds."""
    random = np.random.default_rng(0)
    shapes = ((spec.expert_width, spec.hidden),) * 2 + ((spec.hidden, spec.expert_width),)
    raw = [random_blocks(random, Type(kind), *shape).reshape(-1) for kind, shape in zip(kinds, shapes, strict=True)]
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in raw]
    matrices = [
        ExpertMatrix(part.expand(spec.num_experts, -1), kind, *shape)
        for part, kind, shape in zip(parts, kinds, shapes, strict=True)
    ]
    gate, up, down = matrices
    experts = LayerExperts(0, spec.num_experts, spec.top_k, spec.hidden, spec.expert_width, gate, up, down)
    layout = SlotLayout(experts)
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.write((parts[0], parts[1], parts[2]), slot)
    memory = slot.to(device).repeat(spec.num_experts, 1)
    return Layer(experts, layout, memory, torch.arange(spec.num_experts, dtype=torch.int32, device=device))


def measure(spec: ModelSpec, kinds: Kinds, num_tokens: int, device: torch.device, rounds: int = 30) -> Measured:
    """Time our kernels and the torch fallback on the same layer and routing."""
    layer = make_layer(spec, kinds, device)
    ours = _time(TritonGpu(), layer, num_tokens, rounds, graph=num_tokens <= DECODE_TOKENS)
    torch_s = _time(TorchGpu(), layer, num_tokens, max(rounds // 10, 1), graph=False)
    return Measured(ours, torch_s, _bound(spec, kinds, num_tokens, device))


def _bound(spec: ModelSpec, kinds: Kinds, num_tokens: int, device: torch.device) -> float:
    target = _target_of(device)
    published = roofline(spec, kinds, target, num_tokens)
    return max(published.memory_s * target.dram_bytes_per_s / copy_bandwidth(device), published.tensor_s)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a large copy on the device."""
    num_bytes = 1 << 29 if device.type == "cuda" else 1 << 24
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_s(lambda: target.copy_(source), lambda: None, device, 10)


def _time(backend: GpuBackend, layer: Layer, num_tokens: int, rounds: int, *, graph: bool) -> float:
    experts, device = layer.experts, layer.memory.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(num_tokens, experts.hidden, device=device).to(dtype)
    ids = torch.zeros(num_tokens, experts.top_k, dtype=torch.int64, device=device)
    weights = torch.rand(num_tokens, experts.top_k, device=device)
    out = torch.zeros(num_tokens, experts.hidden, device=device)
    backend.add_layer(experts, layer.layout, layer.memory)
    backend.prepare(num_tokens)

    def route() -> None:
        scores = torch.rand(num_tokens, experts.num_experts, device=device)
        ids.copy_(scores.topk(experts.top_k).indices)

    def launch() -> None:
        # The fallback's cost is an expert's, so it is given those that are used; ours finds them itself.
        used = layer.slots if isinstance(backend, TritonGpu) else [(e, e) for e in ids.unique().tolist()]
        backend.launch(0, used, layer.slot_of, hidden, ids, weights, out)

    route()
    launch()  # compiles
    run = _captured(launch) if graph and device.type == "cuda" else launch
    return _median_s(run, route, device, rounds)


def _captured(launch: Callable[[], None]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def _median_s(run: Callable[[], object], before: Callable[[], None], device: torch.device, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        before()
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def row(spec: ModelSpec, kinds: Kinds, num_tokens: int, found: Measured) -> str:
    types = "/".join(Type(kind).name for kind in kinds)
    return (
        f"{spec.name:18} {types:16} {num_tokens:5} tokens  {expert_bytes(spec, kinds) / 1e6:6.2f} MB an expert  "
        f"{found.kernels_s * 1e6:9.1f} us  {100 * found.of_roofline:4.0f} % of the roofline  "
        f"{found.over_torch:6.1f}x dequantise-then-multiply"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__, formatter_class=raw)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 64, 512, 1024])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("make bench-gpu needs a CUDA or HIP device, torch finds none; python -m benchmarks.gpu_roofline does not")
        return 1
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for name in options.models:
        for kinds in mixes_of(name):
            for num_tokens in options.tokens:
                print(
                    row(
                        MODELS[name],
                        kinds,
                        num_tokens,
                        measure(MODELS[name], kinds, num_tokens, device, options.rounds),
                    )
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
