"""`hybrimoe plot`: pictures of simulations as PNG or SVG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe_kt.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXAMPLE = """\
example:
  hybrimoe plot speedups --hardware a6000-xeon5220r --output speedups.svg
  hybrimoe plot hit-rate --trace my.npz --output hits.png
  hybrimoe plot timeline --model qwen2-57b-a14b --cache 25% --output step.png
"""
RATIOS = ("25%", "50%", "75%")
SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75)


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    result = argparse.ArgumentParser(
        prog="hybrimoe plot",
        description="Draw speed-ups per model and cache ratio, hit rate over capacity per policy, or one step.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("picture", choices=sorted(PICTURES))
    add("--output", "-o", required=True, metavar="FILE", help="picture to write, .png or .svg")
    add("--hardware", default="default", help="built-in profile or profile file (default: %(default)s)")
    add("--model", action="append", help="model name; speedups takes several (default: the paper's three)")
    add("--trace", metavar="FILE", help="recorded routing instead of a synthetic trace")
    add("--cache", default="25%", help="experts on the GPU, for the timeline (default: 25%%)")
    add("--method", action="append", help="method name; speedups takes several (default: the main ones)")
    add("--policy", action="append", help="cache policy; hit-rate takes several (default: all)")
    add("--prompt-tokens", type=int, default=128, help="length of the synthetic prompt (default: %(default)s)")
    add("--tokens", type=int, default=32, help="decode steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the synthetic trace (default: %(default)s)")
    return result


def main(arguments: Sequence[str]) -> int:
    """Draw one picture and say where it is."""
    options = parser().parse_args(arguments)
    from hybrimoe_kt.sim import plots

    if Path(options.output).suffix not in plots.FORMATS:
        raise ConfigError(f"{options.output}: pictures end in .png or .svg")
    figure = PICTURES[options.picture](options)
    print(plots.save(figure, options.output))
    return 0


def _speedups(options: argparse.Namespace) -> Figure:
    from hybrimoe_kt.sim import plots
    from hybrimoe_kt.sim.models import PAPER_MODELS
    from hybrimoe_kt.sim.scenario import METHODS, STATIC, synthetic

    methods = options.method or ["fiddler", "adapmoe", "paper", "default", "oracle"]
    for name in methods:
        if name not in METHODS:
            raise ConfigError(unknown_name("method", name, METHODS))
    prefill: dict[str, dict[str, dict[str, float]]] = {}
    decode: dict[str, dict[str, dict[str, float]]] = {}
    for model in options.model or PAPER_MODELS:
        for ratio in RATIOS:
            scenario = synthetic(
                model, options.hardware, ratio, prompt_tokens=options.prompt_tokens, tokens=options.tokens,
                seed=options.seed,
            )  # fmt: skip
            static = scenario.run(STATIC)
            runs = {name: scenario.run(METHODS[name]) for name in methods}
            prefill.setdefault(model, {})[ratio] = {name: static.ttft_s / run.ttft_s for name, run in runs.items()}
            decode.setdefault(model, {})[ratio] = {name: static.token_s / run.token_s for name, run in runs.items()}
    return plots.speedup_bars({"prefill": prefill, "decode": decode})


def _hit_rate(options: argparse.Namespace) -> Figure:
    from hybrimoe_kt.core.policies import POLICIES
    from hybrimoe_kt.sim import plots
    from hybrimoe_kt.sim.generate import generate
    from hybrimoe_kt.sim.hit_rate import hit_rate_curves
    from hybrimoe_kt.sim.trace_file import read_trace

    if options.trace:
        trace, name = read_trace(options.trace), Path(options.trace).stem
    else:
        name = _one(options.model, "--model NAME or --trace FILE")
        trace = generate(name, prompt_tokens=options.prompt_tokens, tokens=options.tokens, seed=options.seed, depth=0)
        name += " (synthetic trace)"
    slots = sorted({max(1, round(share * trace.num_experts)) for share in SHARES})
    curves = hit_rate_curves(trace, options.policy or list(POLICIES), slots)
    return plots.hit_rate_lines(f"Hit rate over capacity, {name}", slots, trace.num_experts, curves)


def _timeline(options: argparse.Namespace) -> Figure:
    from hybrimoe_kt.sim import plots
    from hybrimoe_kt.sim.machine import Span
    from hybrimoe_kt.sim.scenario import METHODS, recorded, synthetic

    method = options.method[-1] if options.method else "default"
    if method not in METHODS:
        raise ConfigError(unknown_name("method", method, METHODS))
    if options.tokens < 1:
        raise ConfigError(f"tokens {options.tokens}: a timeline shows the last decode step; use 1 or more")
    if options.trace:
        model = options.model[-1] if options.model else None
        scenario = recorded(options.trace, options.hardware, options.cache, model=model, tokens=options.tokens)
    else:
        scenario = synthetic(
            _one(options.model, "--model NAME or --trace FILE"), options.hardware, options.cache,
            prompt_tokens=options.prompt_tokens, tokens=options.tokens, seed=options.seed,
        )  # fmt: skip
    spans: list[Span] = []
    run = scenario.run(METHODS[method], on_span=spans.append)
    end_s = max(span.end_s for span in spans if span.kind != "link")
    last_s = run.phases["decode"].seconds[-1]
    title = f"One decode step: {scenario.trace.model}, {scenario.ratio:.0%} cache, {method}, {last_s * 1e3:.1f} ms"
    return plots.step_timeline(title, spans, end_s - last_s, end_s)


def _one(given: list[str] | None, needed: str) -> str:
    if not given:
        raise ConfigError(f"nothing to draw: give {needed}")
    return given[-1]


PICTURES = {"speedups": _speedups, "hit-rate": _hit_rate, "timeline": _timeline}
