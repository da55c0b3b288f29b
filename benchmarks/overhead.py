"""Our own time per MoE layer, with experts that cost nothing: reading, planning, bookkeeping, submitting, joining.

    python -m benchmarks.overhead            # table of where the time goes
    python -m benchmarks.overhead --profile  # the same by function, from cProfile

128 experts, 8 per token, half of them resident, decode, on the immediate emulator; CPU and GPU backends that do
nothing. What is left is what a layer costs beside its experts, but for the driver calls of a real device. Medians of
layer steps, so that what else a machine does counts for little.

The gates of the next layers are asked as a model asks them, three Qwen3 routers ahead, and on a device they are its
work. Here torch computes them in the call, so the time inside is told apart: "ours" is everything else of a layer. Of
that, learning from the plan and choosing prefetches come while the experts compute: what is left is the path.
Hidden states are 128 wide, so that what is told apart is calls of torch and little arithmetic; their weights still pass
through the caches that everything else of a layer lives in, which `--guesses-given` spares it.

With `--captured` all that a device is given of a layer is a replay or two, which is one call of its driver each. Here
it is a recorder's, operation by operation, and told apart as well. Where the CPU has no share, learning and choosing
then come with the next piece under way.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

from benchmarks.clean import refuse_unless_clean
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.readback import Predict
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.sent_routing import SentRouting
from hybrimoe_kt.device.step_graph import StepCapture, StepGraph, opaque
from hybrimoe_kt.host.hf.gates import Gate, GateRow
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble
from hybrimoe_kt.sim.generate import generate
from hybrimoe_kt.sim.models import find_model

EXPERTS, TOP_K, HIDDEN, LAYERS, DEPTH = 128, 8, 128, 8, 3
PARTS = ("read", "plan", "submit_and_gpu", "prefetch", "wait")
ROWS = {
    "read": "read",
    "plan": "plan",
    "submit_and_gpu": "submit_and_gpu",
    "wait": "wait",
    "path": "**ours, on the path**",
    "prefetch": "learn and prefetch",
    "ours": "**ours, all of it**",
    "gates": "gates and replays, here on the CPU",
    "whole": "whole layer",
}
"""Part of a step -> its name in the table."""
_F16 = 1


class FreeCpu(CpuBackend):
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


class FreeGpu(GpuBackend):
    """A GPU backend that adds nothing."""

    name, answers_pairs, finds_routed, decides_on_device = "free", False, True, True

    def refuses(self, experts: LayerExperts) -> None:
        return None

    def add_layer(self, *_: Any) -> None:
        """Nothing to note."""

    def prepare(self, max_tokens: int) -> None:
        """Nothing to allocate."""

    def launch(self, *_: Any) -> None:
        """Nothing to do."""

    def launch_first(self, *_: Any) -> None:
        """Nothing to do."""


class TimedRecorder(Recorder):
    """Adds up the seconds of all replays."""

    spent_s = 0.0

    def end(self) -> StepGraph:
        graph = super().end()
        return TimedGraph(graph)


class TimedGraph:
    """One that `TimedRecorder` recorded."""

    def __init__(self, graph: StepGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        began = time.perf_counter()
        self._graph.replay()
        TimedRecorder.spent_s += time.perf_counter() - began


class Emulated(ImmediateAccelerator):
    """Whose replays are timed."""

    def capture(self) -> StepCapture:
        return TimedRecorder()


def machine(**options: Any) -> Runtime:
    """A runtime whose experts hold 16 values each and cost nothing."""
    given = {"accelerator": "emulated", "cache_size": "50%", "prefetch_size": 2, "max_chunk_tokens": 1} | options
    experts = ModelExperts(ExpertOptions.from_kwargs(given))
    for number in range(LAYERS):
        wide = torch.zeros(EXPERTS, 2 * HIDDEN, dtype=torch.uint8)
        gate, down = ExpertMatrix(wide, _F16, 1, HIDDEN), ExpertMatrix(wide, _F16, HIDDEN, 1)
        experts.add(LayerExperts(number, EXPERTS, TOP_K, HIDDEN, 1, gate, gate, down))
    return assemble(experts, cpu=FreeCpu(), gpus={"emulated": FreeGpu()}, accelerators={"emulated": Emulated()})


def random_gate(layer: int) -> Gate:
    """A router of Qwen3's kind and the norm in front of it."""
    config = Qwen3MoeConfig(num_experts=EXPERTS, num_experts_per_tok=TOP_K, hidden_size=HIDDEN, norm_topk_prob=True)
    router = Qwen3MoeTopKRouter(config)
    generator = torch.Generator().manual_seed(layer)
    router.weight = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator), requires_grad=False)
    return Gate(router, torch.rand(HIDDEN, generator=generator) + 0.5, ())


class Gates:
    """Asks the real gates, always `DEPTH` of them, and guesses what the trace says; see `device.readback.Predict`.

    Without `asked` nothing is computed.
    """

    num_experts = EXPERTS

    def __init__(self, asked: Predict | None, layer: int, guesses: torch.Tensor, scores: torch.Tensor) -> None:
        self.layers = range(layer + 1, layer + 1 + guesses.shape[1])
        self._asked, self._guesses, self._scores, self._step = asked, list(guesses), list(scores), 0
        self._ids, self._probabilities = torch.empty(DEPTH, 1, TOP_K, dtype=torch.int64), torch.empty(DEPTH, EXPERTS)
        self.asked_s = 0.0
        """Inside the last call, and `computed_s` of that in the gates themselves."""
        self.computed_s = 0.0

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        opaque(functools.partial(self._answer, hidden, ids, scores))

    def _answer(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        began = time.perf_counter()
        if self._asked is not None:
            self._asked(hidden, self._ids, self._probabilities)
        computed = time.perf_counter()
        ids.copy_(self._guesses[self._step])
        scores.copy_(self._scores[self._step])
        self._step += 1
        self.asked_s, self.computed_s = time.perf_counter() - began, computed - began


class Walk:
    """Replays a trace of Qwen3-30B-A3B's shape through a runtime."""

    def __init__(self, runtime: Runtime, tokens: int, *, asks_gates: bool = True, captured: bool = False) -> None:
        """`captured`: every step's routing has been sent by a captured piece, which is not timed."""
        self._captured = captured
        self._sent: dict[int, SentRouting] = {}
        self._number = torch.zeros(1, dtype=torch.int64)
        self._answer = torch.empty(1, HIDDEN)
        self.runtime, self.trace = runtime, generate(find_model("qwen3-30b-a3b"), prompt_tokens=0, tokens=tokens)
        self.steps: list[dict[str, float]] = []
        """Seconds of every layer step by part."""
        self._gates: dict[int, Gates] = {}
        self.plans: list[Plan] = []
        trace = self.trace
        assert trace.predicted is not None and trace.predicted_scores is not None and trace.scores is not None
        self._ids = torch.from_numpy(trace.experts.astype(np.int64))
        self._weights = torch.from_numpy(np.ascontiguousarray(trace.weights))
        self._logits = torch.from_numpy(trace.scores).log()
        guesses, scores = torch.from_numpy(trace.predicted.astype(np.int64)), torch.from_numpy(trace.predicted_scores)
        row = GateRow([random_gate(layer) for layer in range(LAYERS + DEPTH)], torch.device("cpu"))
        for layer in range(LAYERS):
            ahead = slice(layer + 1, layer + 1 + DEPTH)
            asked = row.predictor(layer, range(LAYERS + DEPTH), ahead) if asks_gates else None
            num = min(DEPTH, LAYERS - 1 - layer)
            if num:
                gates = Gates(asked, layer, guesses[:, layer, :num, None], scores[:, layer, :num])
                runtime.look_ahead(layer, gates)
                self._gates[layer] = gates

    def run(self) -> None:
        hidden = torch.randn(1, HIDDEN)
        for step in range(len(self._ids)):
            for layer in range(LAYERS):
                ids, weights = self._ids[step : step + 1, layer], self._weights[step, layer][None]
                routed = Routed(hidden, ids, weights, self._logits[step, layer][None])
                sent = self._send(layer, routed) if self._captured else None
                before, began = _parts(self.runtime), time.perf_counter()
                elsewhere = {}
                if sent is None:
                    self.runtime.run(layer, routed)
                    gates = self._gates.get(layer) if self.runtime.options.prefetch_size else None
                    elsewhere["prefetch"] = gates.asked_s if gates is not None else 0.0
                else:
                    job, elsewhere["submit_and_gpu"] = _replays_of(self.runtime.begin, layer, sent.routed, sent)
                    _, elsewhere["wait"] = _replays_of(self.runtime.finish, job, self._answer)
                    _, elsewhere["prefetch"] = _replays_of(self.runtime.settle)  # with the next piece under way
                whole_s, after = time.perf_counter() - began, _parts(self.runtime)
                parts = {name: after[name] - before[name] - elsewhere.get(name, 0.0) for name in PARTS}
                gates_s = sum(elsewhere.values())
                ours_s = whole_s - gates_s
                sums = {"path": ours_s - parts["prefetch"], "ours": ours_s, "gates": gates_s, "whole": whole_s}
                self.steps.append(parts | sums)

    def _send(self, layer: int, routed: Routed) -> SentRouting:
        """Do what a piece does at its end."""
        sent = self._sent.get(layer)
        if sent is None:
            made = self.runtime.lanes[0].readback.sending(routed, None, self._number)
            sent = self._sent[layer] = made
        self._number += 1
        sent.send(routed, None, TimedRecorder())
        sent.expected = int(self._number)
        return sent


def _replays_of(door: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """What a door answers, and seconds in replays meanwhile."""
    before_s = TimedRecorder.spent_s
    return door(*given), TimedRecorder.spent_s - before_s


def _parts(runtime: Runtime) -> dict[str, float]:
    return {name: getattr(runtime.seconds, name) for name in PARTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--policy", default="adaptive")
    parser.add_argument("--prefetch-size", type=int, default=2)
    parser.add_argument("--guesses-given", action="store_true", help="compute no gates, as if a device did")
    parser.add_argument("--captured", action="store_true", help="as in captured steps, whose routing a replay sends")
    parser.add_argument("--profile", action="store_true", help="by function; slower by what measuring costs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        runtime = machine(policy=arguments.policy, prefetch_size=arguments.prefetch_size)
        walk = Walk(runtime, arguments.tokens, asks_gates=not arguments.guesses_given, captured=arguments.captured)
        profiler = cProfile.Profile() if arguments.profile else None
        if profiler is not None:
            profiler.runcall(walk.run)
            refuse_unless_clean(runtime)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
            return
        walk.run()
    refuse_unless_clean(runtime)
    print(f"{EXPERTS} experts, top-{TOP_K}, hidden {HIDDEN}, {len(walk.steps)} layer steps, {arguments.policy} policy")
    print("| us a layer | median | 10 % below | 10 % above |\n|---|--:|--:|--:|")
    for part, name in ROWS.items():
        ordered = sorted([step[part] for step in walk.steps])
        tenth = len(ordered) // 10
        figures = statistics.median(ordered), ordered[tenth], ordered[-1 - tenth]
        print(f"| {name} | {' | '.join(f'{value * 1e6:.0f}' for value in figures)} |")
    print(f"hit rate {runtime.coordinator.stats.hit_rate:.1%}, {runtime.coordinator.stats.num_transfers} transfers")


if __name__ == "__main__":
    main()
