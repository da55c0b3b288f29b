"""Hybrid plans on the clock: does a step take what its plan predicted, and is it faster than one device alone?

    python -m benchmarks.hybrid                      # DeepSeek-V2-Lite's experts, three cache sizes, a few minutes
    python -m benchmarks.hybrid --accelerator cuda   # on a GPU, with its own kernels and link

CPU experts run for real, on the faster library, calibrated first. Without a GPU, it and the link are emulated: they
take the time that the profile of the paper's machine gives them, on the real clock. Routing, scores and look-ahead come
from a synthetic trace with DeepSeek-V2-Lite's locality. All methods run in turn, token by token, so that noise falls on
all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.clean import refuse_unless_clean
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Plan, Routing
from hybrimoe_kt.device.calibrate import calibrate
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.page_locks import PAGE, fresh_pages
from hybrimoe_kt.runtime import ModelExperts, Routed, assemble
from hybrimoe_kt.runtime.assembly import make_cpu_backend, make_gpu_backend
from hybrimoe_kt.sim.generate import generate
from hybrimoe_kt.sim.trace import Trace
from tests.support.random_blocks import Type, random_blocks

EMULATED = "emulated:timed:a6000-xeon5220r"
MODEL = "deepseek-v2-lite"
EXPERTS, TOP_K, HIDDEN, INTER = 64, 6, 2048, 1408
TYPES = (Type.Q4_K, Type.Q4_K, Type.Q5_0)
LAYERS = 3
METHODS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "static": {"scheduler": "static", "prefetch_size": 0},
    "gpu_only": {"scheduler": "gpu_only"},
    "cpu_only": {"scheduler": "cpu_only", "prefetch_size": 0},
}


def random_layer(number: int) -> LayerExperts:
    """One MoE layer of DeepSeek-V2-Lite; all experts hold the same bytes, each in memory of its own.

    Whole pages: a driver page-locks those in place for every method alike, where it would refuse memory of the heap.
    """
    draw = np.random.default_rng(number)

    def matrix(kind: Type, rows: int, columns: int) -> ExpertMatrix:
        one = torch.from_numpy(random_blocks(draw, kind, rows, columns).reshape(1, -1))
        pages = fresh_pages(EXPERTS * one.numel())
        assert pages is not None and pages.numel() % PAGE == 0, "else its last page is not all its own"
        return ExpertMatrix(pages.view(EXPERTS, -1).copy_(one), int(kind), rows, columns)

    gate, up = matrix(TYPES[0], INTER, HIDDEN), matrix(TYPES[1], INTER, HIDDEN)
    return LayerExperts(number, EXPERTS, TOP_K, HIDDEN, INTER, gate, up, matrix(TYPES[2], HIDDEN, INTER))


@dataclass
class Method:
    """One runtime and what its steps took."""

    experts: ModelExperts
    trace: Trace
    layer_s: float
    """Slept between two layers: attention and the rest."""
    device: torch.device
    measured: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    number: int = 0
    """Of the trace's step under way."""
    _plan: Plan | None = None

    def __post_init__(self) -> None:
        def keep(plan: Plan, routing: Routing) -> None:
            self._plan = plan

        self.runtime = assemble(self.experts, on_plan=keep)
        for place in range(LAYERS - 1):
            self.runtime.look_ahead(place, TraceGates(self, place))

    def token(self, number: int, *, keep: bool) -> None:
        """Run one step of the trace through all layers."""
        self.number = number
        step, trace = self.trace.steps[number], self.trace
        assert trace.scores is not None and trace.weights is not None
        hidden = torch.randn(step.num_tokens, HIDDEN).to(self.device)
        total = 0.0
        for place in range(LAYERS):
            ids = torch.from_numpy(
                trace.experts[step.first_token : step.first_token + step.num_tokens, place].astype(np.int64)
            )
            weights = torch.from_numpy(
                np.ascontiguousarray(trace.weights[step.first_token : step.first_token + step.num_tokens, place])
            )
            logits = torch.from_numpy(trace.scores[number, place]).log()[None].expand(step.num_tokens, -1)
            routed = Routed(hidden, ids, weights, logits).to(self.device)
            self._synchronize()
            began = time.perf_counter()
            self.runtime.run(place, routed)
            self._synchronize()
            seconds = time.perf_counter() - began
            total += seconds
            if keep:
                assert self._plan is not None
                self.measured.append(seconds)
                self.predicted.append(self._plan.makespan_s)
            time.sleep(self.layer_s)
        if keep:
            self.token_s.append(total)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @property
    def step_error(self) -> float:
        """Median over the steps of measured over predicted, less 1."""
        return statistics.median(m / p for m, p in zip(self.measured, self.predicted, strict=True)) - 1


class TraceGates:
    """Guesses as the trace has them; see `device.readback.Predict`."""

    num_experts = EXPERTS

    def __init__(self, method: Method, place: int) -> None:
        self.layers = range(place + 1, min(place + 3, LAYERS))
        self._method, self._place = method, place

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        trace, place, num = self._method.trace, self._place, len(self.layers)
        step = trace.steps[self._method.number]
        assert trace.predicted is not None and trace.predicted_scores is not None
        tokens = slice(step.first_token, step.first_token + step.num_tokens)
        chosen = np.ascontiguousarray(trace.predicted[tokens, place, :num].swapaxes(0, 1).astype(np.int64))
        ids.copy_(torch.from_numpy(chosen))
        scores.copy_(torch.from_numpy(np.ascontiguousarray(trace.predicted_scores[step.index, place, :num])))


def calibrated(layers: list[LayerExperts], options: ExpertOptions, folder: Path) -> tuple[Path, float]:
    """Measure this machine's CPU beside the emulated GPU; return the profile file and the time between layers."""
    store = HostStore()
    store.add(layers[0])
    cpu = make_cpu_backend(options, beside_accelerator=True)
    cpu.add_layer(layers[0])
    accelerator = choose_accelerator(options.accelerator)
    assert accelerator is not None, "the benchmark compares with an accelerator"
    gpu = make_gpu_backend(options, accelerator, store)
    measured = calibrate(store, layers[0].layer, cpu, accelerator, gpu, max_tokens=options.max_chunk_tokens)
    assert measured.profile.gpu_layer_s is not None
    return measured.save(folder / "profile.json"), measured.profile.gpu_layer_s


def compare(
    layers: list[LayerExperts], trace: Trace, base: ExpertOptions, cache: str, layer_s: float, warm_up: int
) -> dict[str, Method]:
    """Run all methods over `trace`, interleaved; return what each took."""
    methods = {}
    for name, changes in METHODS.items():
        experts = ModelExperts(base.replace({"cache_size": cache} | changes))
        for layer in layers:
            experts.add(layer)
        device = torch.device("cpu" if base.accelerator.startswith("emulated") else base.accelerator)
        methods[name] = Method(experts, trace, layer_s, device)
    for number in range(len(trace.steps)):
        for method in methods.values():
            method.token(number, keep=number >= warm_up)
    return methods


def options_for(accelerator: str) -> ExpertOptions:
    """What all methods have in common."""
    return ExpertOptions(
        accelerator=accelerator, prefetch_size=2, prefetch_depth=2, host_store="mapped", fallback=False
    )  # fmt: skip


def row(name: str, method: Method, hybrid: Method) -> dict[str, Any]:
    coordinator = method.runtime.coordinator
    return {
        "method": name,
        "token_ms": statistics.median(method.token_s) * 1e3,
        "hybrid_speedup": statistics.median(
            theirs / ours for theirs, ours in zip(method.token_s, hybrid.token_s, strict=True)
        ),
        "step_ms": statistics.median(method.measured) * 1e3,
        "predicted_ms": statistics.median(method.predicted) * 1e3,
        "step_error": method.step_error,
        "hit_rate": coordinator.stats.hit_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=12, help="tokens that are run and not counted")
    parser.add_argument("--cache", nargs="*", default=["25%", "50%", "75%"])
    parser.add_argument("--accelerator", default=EMULATED, metavar="NAME", help="such as cuda (default: emulated)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers = [random_layer(number) for number in range(LAYERS)]
    trace = generate(MODEL, prompt_tokens=0, tokens=arguments.tokens + arguments.warm_up, depth=2)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        base = options_for(arguments.accelerator)
        profile, layer_s = calibrated(layers, base, Path(folder))
        found["profile"] = json.loads(profile.read_text())
        base = base.replace({"profile": str(profile)})
        for cache in arguments.cache:
            methods = compare(layers, trace, base, cache, layer_s, arguments.warm_up)
            for method in methods.values():
                refuse_unless_clean(method.runtime)
            found[cache] = [row(name, method, methods["hybrid"]) for name, method in methods.items()]
            print(f"\ncache {cache}: {LAYERS} layers of {EXPERTS} experts, top-{TOP_K}, {arguments.tokens} tokens\n")
            print("| method | ms per token | hybrid is faster by | step ms | predicted ms | off by | hit rate |")
            print("|---|---|---|---|---|---|---|")
            for r in found[cache]:
                print(
                    f"| {r['method']} | {r['token_ms']:.2f} | {r['hybrid_speedup']:.2f}x | {r['step_ms']:.2f} | "
                    f"{r['predicted_ms']:.2f} | {r['step_error']:+.1%} | {r['hit_rate']:.1%} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
