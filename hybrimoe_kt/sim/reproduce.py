"""Writes docs/reproduction.md: `python -m hybrimoe_kt.sim.reproduce [--output DIR]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from hybrimoe_kt.core.timeline import Timeline

from . import drawing, experiments, plots
from .experiments import COMPARED, DECODE_PROMPT, HARDWARE, PLANNED, PLANNED_HARDWARE
from .hit_rate import hit_rate_curves
from .models import PAPER_MODELS
from .plot_timeline import find_window, step_timeline
from .reproduction_text import Results, document
from .scenario import METHODS, synthetic
from .trace_file import read_trace

LAUNCH_S = (0.00049, 0.00025, 0.00012, 0.00005)
TRACES = {
    "Qwen3-30B-A3B": "tests/data/traces/qwen3-30b-a3b.npz",
    "Gemma-4-26B-A4B": "tests/data/traces/gemma4-26b-a4b.npz",
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(prog="python -m hybrimoe_kt.sim.reproduce", description=main.__doc__)
    parser.add_argument("--output", default="docs", help="folder of reproduction.md and images/ (default: %(default)s)")
    parser.add_argument("--root", default=".", help="repository root, where the recorded traces are")
    options = parser.parse_args(arguments)
    folder = Path(options.output)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    results = measure(Path(options.root))
    draw(results, Path(options.root), folder / "images")
    (folder / "reproduction.md").write_text(document(results), encoding="utf-8")
    print(folder / "reproduction.md")
    return 0


def measure(root: Path) -> Results:
    """Run every experiment, saying on the terminal which one is under way."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("reproducing") as status:

        def progress(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text)

        files = {name: str(root / path) for name, path in TRACES.items()}
        return Results(
            decode=experiments.decode_cells(progress),
            prefill=experiments.prefill_cells(progress),
            ablation=experiments.ablation(progress),
            hits=experiments.hit_rates(progress, experiments.POLICIES),
            launch=experiments.launch_cost_sweep(progress, LAUNCH_S),
            recorded=experiments.recorded_cells(progress, files, COMPARED),
            planned={
                hardware: experiments.recorded_cells(progress, files, PLANNED, hardware)
                for hardware in PLANNED_HARDWARE
            },
        )


def draw(results: Results, root: Path, folder: Path) -> None:
    """Write the three pictures the document and the README show."""
    methods = ("fiddler", "adapmoe", "paper", "default", "oracle")
    bars = {
        title: {
            model: {
                cell.ratio: {name: cell.speedup(name) for name in methods}
                for cell in cells
                if cell.model == model and cell.prompt_tokens == DECODE_PROMPT
            }
            for model in PAPER_MODELS
        }
        for title, cells in (("prefill", results.prefill), ("decode", results.decode))
    }
    drawing.save(plots.speedup_bars(bars), folder / "speedups.png")
    trace = read_trace(root / TRACES["Qwen3-30B-A3B"])
    slots = [8, 16, 24, 32, 48, 64, 96]
    curves = hit_rate_curves(trace, ("lru", "lfu", "mrs", "adaptive", "belady"), slots)
    title = "Hit rate over capacity, recorded Qwen3-30B-A3B trace"
    drawing.save(plots.hit_rate_lines(title, slots, trace.num_experts, curves), folder / "hit-rate.png")
    timeline = Timeline(10**9)
    synthetic("qwen2-57b-a14b", HARDWARE, "25%", tokens=16).run(METHODS["default"], on_span=timeline.add)
    window = find_window(timeline)
    title = f"qwen2-57b-a14b: one decode step, 25% cache, default, {(window.end_s - window.start_s) * 1e3:.2f} ms"
    drawing.save(step_timeline(title, timeline.spans, window.start_s, window.end_s), folder / "timeline.png")


if __name__ == "__main__":
    raise SystemExit(main())
