"""Step 3: one MoE layer's experts on the card beside the bandwidth of a copy, and beside dequantise-then-multiply.

Every expert is in a slot. Many launches, each with another routing, are captured in one graph: so starting it does not
count, and decode finds its weights in DRAM rather than in the L2 cache.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_roofline import expert_bytes, mixes_of, roofline
from hybrimoe_kt.backends.gpu_torch import TorchGpu
from hybrimoe_kt.device.backend import GpuBackend, Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.errors import summary
from hybrimoe_kt.sim.models import MODELS, ModelSpec
from tests.support.random_blocks import Type, random_blocks

from . import linears
from .plan import Plan
from .results import Results
from .timing import captured, host_s, on_device_s

__all__ = ["Layer", "copy_bandwidth", "make_layer", "measure", "run"]

STEP, TABLE = "kernels", "kernels"
LAUNCHES = {1: 32, 2: 24, 4: 16, 8: 12, 16: 8, 64: 6, 512: 3}
"""Tokens -> launches in one graph."""
TINY = ModelSpec("tiny", (0,), 1, num_experts=2, top_k=1, hidden=256, expert_width=256, attention=0)
Kinds = tuple[int, int, int]


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


def run(plan: Plan, results: Results, ends_s: float) -> None:
    """A row for every model, mixture of types and number of tokens, and those of linear layers."""
    from hybrimoe_kt.backends.gpu_triton import TritonGpu

    device = torch.device("cpu") if plan.is_emulated else torch.device(plan.accelerator)
    bandwidth = copy_bandwidth(device, 1 << 20 if plan.is_emulated else 1 << 30)
    results.add(
        STEP,
        "bandwidth",
        "copy of random bytes on the card",
        {"value": bandwidth / 1e9, "unit": "GB/s"},
        note="read and written together",
    )
    reason = TritonGpu.unusable(device)
    if reason is not None:
        results.leave_out(STEP, TABLE, "all", f"{reason}; experts are dequantised and multiplied by torch")
        return
    specs = [TINY] if plan.is_emulated else [MODELS[name] for name in plan.models]
    counts = (1, 9) if plan.is_emulated else (1, 8, 64, 512) if plan.quick else tuple(LAUNCHES)
    for spec in specs:
        for kinds in mixes_of(spec.name)[: 1 if plan.is_emulated or plan.quick else None]:
            _rows(spec, kinds, counts, device, bandwidth, results, ends_s, launches=1 if plan.is_emulated else 0)
    linears.run(plan, results, device, bandwidth, ends_s)


def _rows(
    spec: ModelSpec,
    kinds: Kinds,
    counts: tuple[int, ...],
    device: torch.device,
    bandwidth: float,
    results: Results,
    ends_s: float,
    *,
    launches: int,
) -> None:
    layer = None
    for num_tokens in counts:
        name = f"{spec.name}, {'/'.join(Type(kind).name for kind in kinds)}, {num_tokens} token{'s' * (num_tokens > 1)}"
        if time.monotonic() > ends_s:
            results.leave_out(STEP, TABLE, name, "out of time")
            continue
        try:
            layer = layer or make_layer(spec, kinds, device)
            found = measure(layer, spec, kinds, num_tokens, bandwidth, launches or LAUNCHES[num_tokens])
        except Exception as error:  # the rest may do
            results.fail(STEP, TABLE, name, summary(error))
            continue
        if device.type == "cpu":
            del found["of_roofline"]  # nobody publishes an interpreter's rates
        results.add(STEP, TABLE, name, found)


def make_layer(spec: ModelSpec, kinds: Kinds, device: torch.device) -> Layer:
    """One random expert, copied into every slot: as good for timing, and made in seconds."""
    random = np.random.default_rng(0)
    shapes = ((spec.expert_width, spec.hidden),) * 2 + ((spec.hidden, spec.expert_width),)
    raw = [random_blocks(random, Type(kind), *shape).reshape(-1) for kind, shape in zip(kinds, shapes, strict=True)]
    parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in raw]
    gate, up, down = (
        ExpertMatrix(part.expand(spec.num_experts, -1), kind, *shape)
        for part, kind, shape in zip(parts, kinds, shapes, strict=True)
    )
    experts = LayerExperts(0, spec.num_experts, spec.top_k, spec.hidden, spec.expert_width, gate, up, down)
    layout = SlotLayout(experts)
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.write(parts, slot)
    memory = slot.to(device).repeat(spec.num_experts, 1)
    return Layer(experts, layout, memory, torch.arange(spec.num_experts, dtype=torch.int32, device=device))


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, read and written together, of a large copy of random bytes on the device."""
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / on_device_s(lambda: target.copy_(source), device, 10)


def measure(
    layer: Layer, spec: ModelSpec, kinds: Kinds, num_tokens: int, bandwidth: float, launches: int
) -> dict[str, Any]:
    """Seconds of one launch and what follows from them.

    `of_roofline` is against the used experts' bytes over `bandwidth`, or the multiply-adds over the published
    tensor-core rate, whichever takes longer.
    """
    from hybrimoe_kt.backends.gpu_triton import TritonGpu, target_of

    device = layer.memory.device
    work = _Work(TritonGpu(), layer, num_tokens, launches)
    work()  # compiles
    is_card = device.type == "cuda"
    host = host_s(work, device, 3 if is_card else 1) / launches
    seconds = on_device_s(captured(work) if is_card else work, device, 15 if is_card else 1) / launches
    plain = _Work(TorchGpu(), layer, num_tokens, 1)
    plain()
    torch_s = on_device_s(plain, device, 3)
    used_bytes = work.num_used * expert_bytes(spec, kinds)
    tensor_s = roofline(spec, kinds, target_of(device), num_tokens).tensor_s
    return {
        "us": seconds * 1e6, "host_us": host * 1e6, "experts": work.num_used, "gb_per_s": used_bytes / seconds / 1e9,
        "of_copy": used_bytes / seconds / bandwidth, "of_roofline": max(used_bytes / bandwidth, tensor_s) / seconds,
        "over_torch": torch_s / seconds,
    }  # fmt: skip


class _Work:
    """`launches` launches of one layer, each with a routing of its own."""

    def __init__(self, backend: GpuBackend, layer: Layer, num_tokens: int, launches: int) -> None:
        experts, device = layer.experts, layer.memory.device
        self._backend, self._layer = backend, layer
        backend.add_layer(experts, layer.layout, layer.memory)
        backend.prepare(num_tokens)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._hidden = torch.randn(num_tokens, experts.hidden, device=device).to(dtype)
        self._weights = torch.rand(num_tokens, experts.top_k, device=device)
        self._out = torch.zeros(num_tokens, experts.hidden, device=device)
        shape = num_tokens, experts.num_experts
        self._routes = [
            torch.rand(shape, device=device).topk(experts.top_k).indices.contiguous() for _ in range(launches)
        ]
        used = [route.unique().tolist() for route in self._routes]
        self.num_used = sum(map(len, used)) / launches
        # the fallback's cost is an expert's, so it is given those that are used; our kernels find them themselves
        self._slots = [layer.slots if backend.name == "triton" else [(e, e) for e in some] for some in used]

    def __call__(self) -> None:
        for ids, slots in zip(self._routes, self._slots, strict=True):
            routed = Routed(self._hidden, ids, self._weights)
            self._backend.launch(0, slots, self._layer.slot_of, routed, self._out)
