"""What each picture of `hybrimoe plot` shows: its numbers, and how they are drawn if anyone wants that."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hybrimoe_kt.core.policies import POLICIES
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.errors import ConfigError, unknown_name
from hybrimoe_kt.sim import hit_rate, plot_timeline, plot_trace, plots
from hybrimoe_kt.sim.generate import generate
from hybrimoe_kt.sim.models import PAPER_MODELS
from hybrimoe_kt.sim.scenario import METHODS, STATIC, Method, find_slots, recorded, synthetic
from hybrimoe_kt.sim.timeline import read_timeline
from hybrimoe_kt.sim.trace import Trace
from hybrimoe_kt.sim.trace_file import read_trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MAKE", "Picture"]

RATIOS = ("25%", "50%", "75%")
SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75)
SIZES = ("12.5%", "25%")
SHOWN_STEPS = 120
FOLLOWED = ("lru", "lfu", "mrs", "adaptive")


class Picture(NamedTuple):
    """The numbers, as plain data, and what draws them."""

    numbers: dict[str, Any]
    draw: Callable[[], Figure]


def _heat_map(options: argparse.Namespace) -> Picture:
    trace = read_trace(options.trace)
    wanted = [step for step in trace.steps if options.phase in ("all", step.phase)]
    if not wanted:
        raise ConfigError(f"{options.trace}: has no {options.phase} step; --phase all counts every token")
    rows = np.concatenate([np.arange(step.first_token, step.first_token + step.num_tokens) for step in wanted])
    chosen = trace.experts[rows]
    counts = np.stack(
        [np.bincount(layer[layer >= 0], minlength=trace.num_experts) for layer in chosen.transpose(1, 0, 2)]
    )
    shares = counts / np.maximum(1, (chosen[:, :, 0] >= 0).sum(axis=0))[:, None]
    if options.sorted:
        shares = -np.sort(-shares, axis=1)
    what = "" if options.phase == "all" else f"{options.phase} "
    title = f"{trace.model}: {len(rows)} {what}tokens, top {trace.top_k} of {trace.num_experts}"
    numbers = {"model": trace.model, "tokens": len(rows), "layers": list(trace.layers), "share": shares.tolist()}
    return Picture(numbers, lambda: plot_trace.heat_map(title, trace.layers, shares, is_sorted=options.sorted))


def _over_time(options: argparse.Namespace) -> Picture:
    trace = read_trace(options.trace)
    if options.window < 1:
        raise ConfigError(f"--window {options.window}: average over 1 step or more")
    policies = [*dict.fromkeys([*_policies(options.policy, FOLLOWED), "belady"])]
    curves: dict[str, dict[str, list[float]]] = {}
    for size in options.cache or SIZES:
        slots = find_slots(size, trace)
        curves[f"{slots} of {trace.num_experts} experts"] = {
            policy: hit_rate.windowed(hit_rate.hits_per_step(trace, policy, slots), options.window)
            for policy in policies
        }
    steps = hit_rate.usual_steps(trace)
    changes = [at for at in range(1, len(steps)) if steps[at].request != steps[at - 1].request]
    title = f"{trace.model}: hit rate over time, caches empty at first"
    numbers = {"model": trace.model, "window_steps": options.window, "requests_begin": changes, "hit_rate": curves}
    return Picture(numbers, lambda: plot_trace.hit_rate_over_time(title, curves, changes, options.window))


def _occupancy(options: argparse.Namespace) -> Picture:
    trace = read_trace(options.trace)
    layer = trace.layers[0] if options.layer is None else options.layer
    (policy,) = _policies([options.policy], ())
    slots = find_slots(options.cache, trace)
    lookups = hit_rate.occupancy(trace, policy, slots, layer)
    end = min(len(lookups), options.first + SHOWN_STEPS if options.end is None else options.end)
    if not 0 <= options.first < end:
        raise ConfigError(f"no steps to show: the trace has {len(lookups)}, give --from less than --to within them")
    shown = lookups[options.first : end]
    misses = sum(len(found.missing) for found in shown)
    routed = sum(len(found.routing.loads) for found in shown)
    rate = 1 - misses / routed
    title = f"{trace.model}, layer {layer}: {slots} slots, {policy}, hit rate {rate:.0%}"
    if len(shown) < len(lookups):
        title += f" (steps {options.first} to {end - 1} of {len(lookups)})"
    numbers = {
        "model": trace.model, "layer": layer, "policy": policy, "slots": slots, "hit_rate": rate,
        "steps": [
            {
                "step": options.first + at,
                "hits": [expert for expert in found.routing.loads if expert not in found.missing],
                "misses": list(found.missing),
                "in_slots": [expert for expert in found.occupant if expert >= 0],
            }
            for at, found in enumerate(shown)
        ],
    }  # fmt: skip
    return Picture(numbers, lambda: plot_trace.occupancy_chart(title, shown, trace.num_experts, options.first))


def _hit_rate(options: argparse.Namespace) -> Picture:
    trace, name = _routing(options)
    slots = sorted({max(1, round(share * trace.num_experts)) for share in SHARES})
    curves = hit_rate.hit_rate_curves(trace, _policies(options.policy, tuple(POLICIES)), slots)
    numbers = {"model": trace.model, "num_experts": trace.num_experts, "slots": slots, "hit_rate": curves}
    title = f"Hit rate over capacity, {name}"
    return Picture(numbers, lambda: plots.hit_rate_lines(title, slots, trace.num_experts, curves))


def _routing(options: argparse.Namespace) -> tuple[Trace, str]:
    if options.trace:
        return read_trace(options.trace), Path(options.trace).stem
    name = _one(options.model, "--model NAME or --trace FILE")
    trace = generate(name, prompt_tokens=options.prompt_tokens, tokens=options.tokens, seed=options.seed, depth=0)
    return trace, f"{name} (synthetic trace)"


def _timeline(options: argparse.Namespace) -> Picture:
    if options.timeline is not None:
        timeline, name = read_timeline(options.timeline), None
    else:
        for flag, value in (("step", options.step), ("from", options.from_ms), ("to", options.to_ms)):
            if value is not None:
                raise ConfigError(f"--{flag} picks from a recorded --timeline; give one")
        timeline, name = _simulated(options)
    window = plot_timeline.find_window(timeline, step=options.step, from_ms=options.from_ms, to_ms=options.to_ms)
    length = f"{(window.end_s - window.start_s) * 1e3:.2f} ms"
    title = f"{timeline.info.get('model', 'a run')}: {name or window.name}, {length}"
    drawn = plot_timeline.drawn_spans(timeline.spans, window)
    numbers = {
        "model": timeline.info.get("model"), "window": window.name, "from_s": window.start_s, "to_s": window.end_s,
        "spans": [
            {
                "lane": span.lane_name, "work": span.work, "layer": span.layer, "experts": list(span.experts),
                "from_s": span.start_s, "to_s": span.end_s,
            }
            for span in drawn
        ],
    }  # fmt: skip
    return Picture(numbers, lambda: plot_timeline.step_timeline(title, drawn, window.start_s, window.end_s))


def _simulated(options: argparse.Namespace) -> tuple[Timeline, str]:
    name = options.method[-1] if options.method else "default"
    method = _method(name)
    if options.tokens < 1:
        raise ConfigError(f"tokens {options.tokens}: a timeline shows the last decode step; use 1 or more")
    if options.trace:
        model = options.model[-1] if options.model else None
        scenario = recorded(options.trace, options.hardware, options.cache, model=model, tokens=options.tokens)
    else:
        scenario = synthetic(
            _one(options.model, "--timeline FILE, --model NAME or --trace FILE"), options.hardware, options.cache,
            prompt_tokens=options.prompt_tokens, tokens=options.tokens, seed=options.seed,
        )  # fmt: skip
    timeline = Timeline(10**9, model=scenario.trace.model)
    scenario.run(method, on_span=timeline.add)
    return timeline, f"one decode step, {scenario.ratio:.0%} cache, {name}"


def _speedups(options: argparse.Namespace) -> Picture:
    methods = options.method or ["fiddler", "adapmoe", "paper", "default", "oracle"]
    chosen = {name: _method(name) for name in methods}
    bars: dict[str, dict[str, dict[str, dict[str, float]]]] = {"prefill": {}, "decode": {}}
    for model in options.model or PAPER_MODELS:
        for ratio in RATIOS:
            scenario = synthetic(
                model, options.hardware, ratio, prompt_tokens=options.prompt_tokens, tokens=options.tokens,
                seed=options.seed,
            )  # fmt: skip
            static = scenario.run(STATIC)
            runs = {name: scenario.run(method) for name, method in chosen.items()}
            for phase, seconds in (("prefill", "ttft_s"), ("decode", "token_s")):
                faster = {name: getattr(static, seconds) / getattr(run, seconds) for name, run in runs.items()}
                bars[phase].setdefault(model, {})[ratio] = faster
    return Picture({"hardware": options.hardware, "speed_up": bars}, lambda: plots.speedup_bars(bars))


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ConfigError(unknown_name("method", name, METHODS))
    return METHODS[name]


def _policies(given: list[str] | None, default: tuple[str, ...]) -> list[str]:
    for name in given or ():
        if name not in POLICIES:
            raise ConfigError(unknown_name("policy", name, POLICIES))
    return list(given or default)


def _one(given: list[str] | None, needed: str) -> str:
    if not given:
        raise ConfigError(f"nothing to draw: give {needed}")
    return given[-1]


MAKE: Mapping[str, Callable[[argparse.Namespace], Picture]] = {
    "heat-map": _heat_map,
    "over-time": _over_time,
    "occupancy": _occupancy,
    "hit-rate": _hit_rate,
    "timeline": _timeline,
    "speedups": _speedups,
}
