"""Our own time per MoE layer, with experts that cost nothing: reading, planning, bookkeeping, submitting, joining.

    python -m benchmarks.overhead            # table of where the time goes
    python -m benchmarks.overhead --profile  # the same by function, from cProfile

128 experts, 8 per token, half of them resident, decode, on the immediate emulator; CPU and GPU backends that do
nothing. What is left is what a layer costs beside its experts, but for the gates' own arithmetic and the driver calls
of a real device.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.device.host_store import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.inbox import Guesses
from hybrimoe_kt.operators import assembly
from hybrimoe_kt.operators.runtime import Runtime
from hybrimoe_kt.sim.generate import generate
from hybrimoe_kt.sim.models import find_model

EXPERTS, TOP_K, HIDDEN, LAYERS = 128, 8, 2048, 4
_F16 = 1


class FreeCpu:
    """A CPU backend that answers zeros at once."""

    name, answers_pairs, num_threads = "free", False, 0

    def __init__(self) -> None:
        self._answer = torch.zeros(1, HIDDEN)

    def add_layer(self, experts: LayerExperts) -> None:
        """Nothing to take."""

    def copies(self, layer: int) -> bool:
        return False

    def submit(self, *_: Any) -> None:
        """Nothing to do."""

    def is_done(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self._answer


class FreeGpu:
    """A GPU backend that adds nothing."""

    name, answers_pairs = "free", False

    def refuses(self, experts: LayerExperts) -> None:
        return None

    def add_layer(self, *_: Any) -> None:
        """Nothing to note."""

    def prepare(self, max_tokens: int) -> None:
        """Nothing to allocate."""

    def launch(self, *_: Any) -> None:
        """Nothing to do."""


def machine(patch: pytest.MonkeyPatch, **options: Any) -> Runtime:
    """A runtime whose experts hold 16 values each and cost nothing."""
    patch.setattr(assembly, "make_cpu_backend", lambda options: FreeCpu())
    patch.setattr(assembly, "make_gpu_backend", lambda *_: FreeGpu())
    given = {"accelerator": "emulated", "cache_size": "50%", "prefetch_size": 2, "max_chunk_tokens": 1} | options
    runtime = Runtime(ExpertOptions.from_kwargs(given))
    for number in range(LAYERS):
        wide = torch.zeros(EXPERTS, 2 * HIDDEN, dtype=torch.uint8)
        gate, down = ExpertMatrix(wide, _F16, 1, HIDDEN), ExpertMatrix(wide, _F16, HIDDEN, 1)
        runtime.add_layer(LayerExperts(number, EXPERTS, TOP_K, HIDDEN, 1, gate, gate, down))
    return runtime


class Walk:
    """Replays a trace of Qwen3-30B-A3B's shape through a runtime."""

    def __init__(self, runtime: Runtime, tokens: int) -> None:
        self.runtime, self.trace = runtime, generate(find_model("qwen3-30b-a3b"), prompt_tokens=0, tokens=tokens)
        self.seconds: list[float] = []
        self.plans: list[Plan] = []
        trace = self.trace
        assert trace.predicted is not None and trace.predicted_scores is not None and trace.scores is not None
        self._ids = torch.from_numpy(trace.experts.astype(np.int64))
        self._weights = torch.from_numpy(np.ascontiguousarray(trace.weights))
        self._logits = torch.from_numpy(trace.scores).log()
        self._guesses = torch.from_numpy(trace.predicted.astype(np.int64))
        self._guess_scores = torch.from_numpy(trace.predicted_scores)
        self._step = 0
        runtime.start()
        for layer in range(LAYERS - 1):
            runtime.look_ahead(layer, self._predictor(layer))

    def _predictor(self, layer: int) -> Any:
        num = min(3, LAYERS - 1 - layer)
        later = range(layer + 1, layer + 1 + num)

        made = [
            Guesses(later, self._guesses[step, layer, :num, None], self._guess_scores[step, layer, :num])
            for step in range(len(self._ids))
        ]
        return lambda hidden: made[self._step]

    def run(self) -> None:
        hidden = torch.randn(1, HIDDEN)
        for step in range(len(self._ids)):
            self._step = step
            for layer in range(LAYERS):
                ids, weights = self._ids[step : step + 1, layer], self._weights[step, layer][None]
                self.runtime.note_scores(layer, self._logits[step, layer][None])
                began = time.perf_counter()
                self.runtime.run(layer, hidden, ids, weights)
                self.seconds.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--prefetch-size", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="by function; slower by what measuring costs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        runtime = machine(patch, policy=arguments.policy, prefetch_size=arguments.prefetch_size)
        walk = Walk(runtime, arguments.tokens)
        profiler = cProfile.Profile() if arguments.profile else None
        if profiler is not None:
            profiler.runcall(walk.run)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
            return
        walk.run()
    seconds, steps = runtime.seconds, runtime.seconds.steps
    print(f"{EXPERTS} experts, top-{TOP_K}, hidden {HIDDEN}, {steps} layer steps, {arguments.policy} policy")
    print("| part | mean us |\n|---|---|")
    for name in ("read", "plan", "submit_and_gpu", "prefetch", "wait"):
        print(f"| {name} | {getattr(seconds, name) / steps * 1e6:.0f} |")
    ordered = sorted(walk.seconds)
    low, high = ordered[len(ordered) // 10], ordered[len(ordered) * 9 // 10]
    print(f"| whole layer: median {statistics.median(ordered) * 1e6:.0f}, 10 % below {low * 1e6:.0f}, ", end="")
    print(f"10 % above {high * 1e6:.0f} | {sum(ordered) / len(ordered) * 1e6:.0f} |")
    assert runtime.coordinator is not None
    print(f"hit rate {runtime.coordinator.stats.hit_rate:.1%}, {runtime.coordinator.stats.num_transfers} transfers")


if __name__ == "__main__":
    main()
