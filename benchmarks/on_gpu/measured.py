"""One engine, measured in one configuration after the other."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.backends.torch_reference import expert_ffn
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.runtime.health import Health

from . import inside
from .overlap import busy_shares
from .plan import Plan
from .timing import synchronize

__all__ = ["Measured", "Sizes"]

PARTS = ("replay", "read", "plan", "submit_and_gpu", "prefetch", "wait")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: decoded tokens, those before them that do not count, further passes, prompts."""

    tokens: int
    warm_up: int
    passes: int
    prompts: tuple[int, int]
    repeats: int
    """Of each piece of the calibration."""

    @classmethod
    def of(cls, plan: Plan) -> Sizes:
        if plan.is_emulated:
            return cls(tokens=3, warm_up=1, passes=2, prompts=(9, 24), repeats=1)
        return cls(
            tokens=16 if plan.quick else 40, warm_up=10, passes=10, prompts=(512, 4096), repeats=3 if plan.quick else 7
        )


class Measured:
    """Feeds given tokens, so that all configurations compute the same ones."""

    def __init__(self, file: Path, plan: Plan, options: dict[str, Any]) -> None:
        """`options` are those of the first configuration; everything the runtime allocates for it begins as NaN."""
        began = time.perf_counter()
        self.sizes = Sizes.of(plan)
        self.engine = inside.load(file, options)
        inside.poison_workspace(self.runtime)
        self.load_s = time.perf_counter() - began
        draw = random.Random(1)
        vocab = self.engine.model.get_input_embeddings().num_embeddings
        most = max(*self.sizes.prompts, self.sizes.warm_up + self.sizes.tokens)
        self.text = [draw.randrange(5, vocab) for _ in range(most)]
        self.options = options

    @property
    def runtime(self) -> Any:
        return self.engine.runtime

    @property
    def health(self) -> Health:
        return self.runtime.health()

    @property
    def layers(self) -> list[int]:
        """First, middle and last MoE layer."""
        layers = sorted(self.runtime.store.layers)
        return sorted({layers[0], layers[len(layers) // 2], layers[-1]})

    def restart(self, changes: dict[str, Any], *, poison: bool = False, eager: bool = False) -> None:
        """Start the runtime anew, its options those of the beginning with `changes`; `eager`: no step is captured."""
        inside.restart(self.engine, self.options | changes, poison=poison)
        if isinstance(self.engine.loop, CapturedLoop):
            self.engine.loop.captures = not eager

    def calibrate(self, folder: Path) -> str:
        """Measure the profile that plans are predicted with, from now on; returns its verdict."""
        found = inside.calibrated(self.runtime, self.sizes.repeats)
        self.options = self.options | {"profile": str(found.save(folder / "profile.json"))}
        return found.verdict

    def errors(self, num_tokens: int) -> dict[int, float]:
        """Relative error of some layers' answers to a prompt against their experts dequantised to float32."""
        found: dict[int, float] = {}

        def compare(module: Any, given: Any, answer: torch.Tensor) -> None:
            wanted = reference(self.runtime.store.layers[module.layer], *given)
            found[module.layer] = float((answer.float() - wanted).norm() / wanted.norm())

        handles = [
            module.register_forward_hook(compare)
            for module in self.engine.model.modules()
            if isinstance(module, HybriMoEExperts) and module.layer in self.layers
        ]
        try:
            self._feed(num_tokens, num_tokens)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def decode(self) -> dict[str, Any]:
        """Milliseconds a token, our own part of them by layer, and what was computed where."""
        warm_up, tokens = self.sizes.warm_up, self.sizes.tokens
        before: dict[str, float] = {}
        times: list[float] = []
        for number, _ in enumerate(self.engine.feed(self.text[: warm_up + tokens], 1)):
            if number == warm_up:  # between two steps: this time belongs to none
                before = self.runtime.statistics()
                self.runtime.seconds.reset()
            times.append(time.perf_counter())
        times.append(time.perf_counter())
        kept = sorted(end - begin for begin, end in zip(times[warm_up:], times[warm_up + 1 :], strict=False))
        steps = max(1, self.runtime.seconds.steps)
        us = {f"{part}_us": getattr(self.runtime.seconds, part) / steps * 1e6 for part in PARTS}
        now = self.runtime.statistics()
        counts = {name: now[name] - before.get(name, 0) for name in now}
        routed = counts["hits"] + counts["pending"] + counts["misses"]
        return us | {
            "ms": statistics.median(kept) * 1e3,
            "p90_ms": kept[min(len(kept) - 1, int(0.9 * len(kept)))] * 1e3,
            "hit_rate": counts["hits"] / routed if routed else None,
            "cpu_experts": counts["experts_on_cpu"] / steps,
            "transfers": counts["num_transfers"] / tokens,
            "prefetches": counts["num_prefetches"] / tokens,
        }

    def overlap(self) -> dict[str, float]:
        """What CPU, GPU and link did at the same time, while decoding."""
        timeline = Timeline(model="generated")
        self.runtime.record_timeline(timeline)
        self._feed(self.sizes.passes + 2, 1)
        finished = self.runtime.finish_timeline()
        return busy_shares(finished) if finished is not None else {}

    def prediction(self) -> dict[str, float]:
        """How far a layer's measured time is from its plan's; nothing where nothing is planned."""
        with inside.watched_plans(self.runtime) as found:
            self._feed(self.sizes.passes + 2, 1)
        kept = found[len(found) // 6 :]
        if not kept:
            return {}
        predicted, measured = (statistics.median(column) for column in zip(*kept, strict=True))
        error = statistics.median(real / planned for planned, real in kept if planned > 0) - 1
        return {"predicted_us": predicted * 1e6, "step_us": measured * 1e6, "off_by": error}

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds of a prompt, from an empty cache to the last token's logits."""
        began = time.perf_counter()
        self._feed(num_tokens, num_tokens)
        return time.perf_counter() - began

    def _feed(self, num_tokens: int, size: int) -> None:
        for _ in self.engine.feed(self.text[:num_tokens], size):
            pass
        for accelerator in self.runtime.accelerators:
            synchronize(accelerator.device)


def reference(experts: LayerExperts, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A layer's answer from its experts in float32, wherever `hidden` is; `[num_tokens, hidden]`."""
    x, total = hidden.float(), torch.zeros_like(hidden, dtype=torch.float32)
    for index in ids.unique().tolist():
        token, place = torch.where(ids == index)
        parts = [
            dequantize(matrix.data[index].to(hidden.device, copy=True), matrix.ggml_type, (matrix.rows, matrix.columns))
            for matrix in experts.matrices
        ]
        total[token] += expert_ffn(x[token], *parts) * weights[token, place, None].float()
    return total
