"""`hybrimoe simulate`: options, a progress bar and a table around the replay."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe_kt.errors import ConfigError

from .terminal import Parser, check_writable

if TYPE_CHECKING:
    from hybrimoe_kt.sim.scenario import Method, Scenario

EXAMPLE = """\
examples:
  hybrimoe simulate --model qwen2-57b-a14b --hardware a6000-xeon5220r
  hybrimoe simulate --trace my.npz --cache 12GiB --method paper --json
  hybrimoe simulate --trace my.npz --timeline run.json
  hybrimoe simulate --trace my.npz --method recorded   as the run itself was

A method is a named bundle of scheduler, policy and prefetch; each of them
given on its own replaces that part. Models without --trace run on a synthetic
trace of the same locality as published measurements.
"""


def parser() -> argparse.ArgumentParser:
    """Return the command's options; values are validated where they are used, so every front end says the same."""
    result = Parser(
        prog="hybrimoe simulate",
        description="Replay expert routing through the scheduler on a simulated machine.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--model", help="mixtral-8x7b, qwen2-57b-a14b, deepseek-v2-lite, qwen3-30b-a3b (optional with --trace)")
    add("--hardware", help="built-in profile or profile file (default: default)")
    add("--cache", help="experts on the GPU: 25%%, 16 (per layer) or 12GiB (default: 25%%)")
    add(
        "--method",
        default="default",
        help="default, paper, static, gpu streaming, llama.cpp, adapmoe, fiddler, freetoken, host, device, oracle, "
        "recorded (a trace's own)",
    )
    add("--scheduler", help="balanced, paper, static, fiddler, one_ratio, gpu_only, cpu_only, layer_split")
    add("--policy", help="adaptive, mrs, lru, lfu, lfru, least_stale, static_frequency or belady")
    add("--prefetch", help="off, stale_gate, corrected_gate, history, transition or perfect")
    add("--prefetch-size", type=int, help="transfers started ahead per layer")
    add("--prefetch-depth", type=int, help="layers looked ahead, 1 to 3")
    add("--planner", help="who plans single tokens: host, or device, by the rules of the kernels (mrs or lru)")
    add("--trace", metavar="FILE", help="recorded routing (.npz or route CSV) instead of a synthetic trace")
    add("--prompt-tokens", type=int, default=128, help="length of the synthetic prompt (default: %(default)s)")
    add("--tokens", type=int, help="decode steps (default: 64, or all of the trace's)")
    add("--seed", type=int, default=0, help="seed of the synthetic trace and of the noise (default: %(default)s)")
    add("--noise", type=float, default=0.0, help="standard deviation of log CPU time (default: %(default)s)")
    add("--timeline", type=Path, metavar="FILE", help="write CPU, GPU and link activity as a Chrome/Perfetto trace")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return result


def main(arguments: Sequence[str]) -> int:
    """Run the simulation and print its report."""
    options = parser().parse_args(arguments)
    from hybrimoe_kt.core.timeline import Timeline
    from hybrimoe_kt.sim.compare import simulate
    from hybrimoe_kt.sim.timeline import write_timeline

    if options.noise < 0:
        raise ConfigError(f"noise {options.noise} is negative; use 0 or more")
    method, scenario = _chosen(options)
    if options.timeline:
        check_writable(options.timeline, "--timeline")
    timeline = Timeline(origin="a simulation, on its virtual clock", model=scenario.trace.model)
    with ProgressBar(3 * len(scenario.trace.steps), quiet=options.json) as advance:
        report = simulate(
            scenario,
            method,
            noise=options.noise,
            seed=options.seed,
            on_span=timeline.add if options.timeline else None,
            progress=advance,
        )
    if options.timeline:
        write_timeline(timeline, options.timeline)
    if options.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _render(report)
        if options.method == "recorded" and report["recorded"] is not None:
            ours, theirs = (_text(counted["hit_rate"], "%") for counted in (report["statistics"], report["recorded"]))
            print(f"hit rate over prompts and answers: {ours} here, {theirs} in the recorded run")
        if options.timeline:
            note = f"; {timeline.note}" if timeline.note else ""
            print(f"timeline: {options.timeline} (open it in https://ui.perfetto.dev{note})")
    return 0


def _chosen(options: argparse.Namespace) -> tuple[Method, Scenario]:
    from hybrimoe_kt.errors import unknown_name
    from hybrimoe_kt.sim.rerun import RECORDED, as_recorded
    from hybrimoe_kt.sim.scenario import METHODS

    if options.method == RECORDED:
        if options.trace is None or options.model is not None:
            raise ConfigError(f"--method {RECORDED} replays a --trace as its run was; give one, and no --model")
        method, scenario = as_recorded(
            options.trace, hardware=options.hardware, cache=options.cache, tokens=options.tokens
        )
        return _replaced(method, options), scenario
    if options.method not in METHODS:
        raise ConfigError(unknown_name("method", options.method, [*METHODS, RECORDED]))
    return _replaced(METHODS[options.method], options), _scenario(options)


def _replaced(named: Method, options: argparse.Namespace) -> Method:
    """The method with the parts that options name instead."""
    given = {
        key: value
        for key in ("scheduler", "policy", "prefetch", "prefetch_size", "prefetch_depth", "planner")
        if (value := getattr(options, key)) is not None
    }
    for key, options_of in (("scheduler", "scheduler"), ("policy", "policy"), ("prefetch", "predictor")):
        # Options belong to the part they were written for.
        if key in given and given[key] != getattr(named, key):
            given[f"{options_of}_options"] = {}
    return replace(named, **given)


def _scenario(options: argparse.Namespace) -> Scenario:
    from hybrimoe_kt.sim.scenario import recorded, synthetic

    hardware, cache = options.hardware or "default", "25%" if options.cache is None else options.cache
    if options.trace is not None:
        return recorded(options.trace, hardware, cache, model=options.model, tokens=options.tokens)
    if options.model is None:
        raise ConfigError("nothing to simulate: give --model NAME, --trace FILE, or both")
    return synthetic(
        options.model,
        hardware,
        cache,
        prompt_tokens=options.prompt_tokens,
        tokens=64 if options.tokens is None else options.tokens,
        seed=options.seed,
    )


class ProgressBar:
    """A bar on the terminal's error stream while replays run; silent for scripts."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("replaying", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def _render(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    kind = "synthetic trace" if report["synthetic"] else "recorded trace"
    title = f"{report['model']} on {report['hardware']}, {kind}"
    caption = (
        f"{report['cache_slots_per_layer']} slots a layer ({report['cache_ratio']:.0%}), "
        f"{report['scheduler']} / {report['policy']} / prefetch {report['prefetch']} / {report['planner']} plans"
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("prefill", "decode"):
        table.add_column(name, justify="right")
    for label, prefill, decode in _rows(report):
        table.add_row(label, prefill, decode)
    Console().print(table)


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    prefill, decode = report["prefill"], report["decode"]

    def both(label: str, key: str, style: str) -> tuple[str, str, str]:
        return label, _text(prefill[key], style), _text(decode[key], style)

    return [
        ("time to first token, time per token", _text(report["ttft_s"], "s"), _text(report["token_s"], "s")),
        ("hit rate", _text(report["prefill_hit_rate"], "%"), _text(report["hit_rate"], "%")),
        both("CPU busy", "cpu_busy", "%"),
        both("GPU busy", "gpu_busy", "%"),
        both("link busy", "link_busy", "%"),
        both("experts computed on the CPU", "experts_on_cpu", "%"),
        (
            "speed-up over static placement",
            _text(report["prefill_speedup_over_static"], "x"),
            _text(report["decode_speedup_over_static"], "x"),
        ),
        ("speed-up over streaming misses to the GPU", _text(report["prefill_speedup_over_gpu_streaming"], "x"), "-"),
        (
            "share of the oracle's speed",
            _text(report["prefill_oracle_fraction"], "%"),
            _text(report["decode_oracle_fraction"], "%"),
        ),
        ("lower bound of any method", _text(report["prefill_bound_s"], "s"), _text(report["decode_bound_s"], "s")),
    ]


def _text(value: float | None, style: str) -> str:
    if value is None:
        return "-"
    if style == "%":
        return f"{value:.1%}"
    if style == "x":
        return f"{value:.2f}x"
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
