"""A simulation's report: one method beside static placement, the oracle and the lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hybrimoe_kt.core.timeline import Span

from .replay import PhaseResult, Replay
from .scenario import METHODS, STATIC, Method, Scenario

Report = dict[str, Any]


def simulate(
    scenario: Scenario,
    method: Method,
    *,
    noise: float = 0.0,
    seed: int = 0,
    on_span: Callable[[Span], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Replay `method`, static placement and the oracle on one scenario; times in seconds, shares 0 to 1.

    Numbers that do not exist (no prompt, no decode) are None. `progress` is told of every finished step, three
    times the number of steps in the trace.
    """
    run = scenario.run(method, noise=noise, seed=seed, on_span=on_span, progress=progress)
    static = scenario.run(STATIC, noise=noise, seed=seed, progress=progress)
    oracle = scenario.run(METHODS["oracle"], noise=noise, seed=seed, progress=progress)
    streamed = scenario.prompts_only().run(METHODS["gpu streaming"])
    return {
        "trace": scenario.trace.source,
        "synthetic": scenario.trace.synthetic,
        "model": scenario.trace.model,
        "hardware": scenario.profile.name,
        "cache_slots_per_layer": scenario.num_slots,
        "cache_ratio": scenario.ratio,
        "scheduler": method.scheduler,
        "policy": method.policy,
        "prefetch": method.prefetch,
        "planner": method.planner,
        "ttft_s": _number(run.ttft_s),
        "token_s": _number(run.token_s),
        "tokens_per_s": _ratio(1.0, run.token_s),
        "hit_rate": _number(run.phases["decode"].hit_rate),
        "prefill_hit_rate": _number(run.phases["prefill"].hit_rate),
        "prefill_speedup_over_static": _ratio(static.ttft_s, run.ttft_s),
        "prefill_speedup_over_gpu_streaming": _ratio(streamed.ttft_s, run.ttft_s),
        "decode_speedup_over_static": _ratio(static.token_s, run.token_s),
        "prefill_oracle_fraction": _ratio(oracle.ttft_s, run.ttft_s),
        "decode_oracle_fraction": _ratio(oracle.token_s, run.token_s),
        "prefill_bound_s": _number(scenario.bound_s("prefill")),
        "decode_bound_s": _number(scenario.bound_s("decode")),
        "static": _summary(static),
        "oracle": _summary(oracle),
        "prefill": _phase(run.phases["prefill"]),
        "decode": _phase(run.phases["decode"]),
        "statistics": dict(run.stats),
        "recorded": scenario.trace.run.get("counters"),
        "digest": run.digest,
    }


def _summary(run: Replay) -> Report:
    return {
        "ttft_s": _number(run.ttft_s),
        "token_s": _number(run.token_s),
        "hit_rate": _number(run.phases["decode"].hit_rate),
    }


def _phase(result: PhaseResult) -> Report:
    steps = len(result.seconds)
    return {
        "steps": steps,
        "cpu_busy": _number(result.share("cpu")),
        "gpu_busy": _number(result.share("gpu")),
        "link_busy": _number(result.share("link")),
        "experts_on_cpu": _ratio(result.experts_on_cpu, result.routed),
        "transfers_per_step": _ratio(result.num_transfers, steps),
        "prefetches_per_step": _ratio(result.num_prefetches, steps),
        "moved_bytes_per_step": _ratio(result.moved_bytes, steps),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ratio(above: float, below: float) -> float | None:
    return _number(above / below) if below else None
