"""`hybrimoe calibrate`: measure this machine and write its profile."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hybrimoe_kt import accelerators
from hybrimoe_kt.backends.registry import CPU_BACKENDS, DEFAULT_CPU
from hybrimoe_kt.errors import ConfigError

from .terminal import Parser, check_writable

if TYPE_CHECKING:
    from hybrimoe_kt.device.backend import CandidateSeconds, CpuBackend
    from hybrimoe_kt.device.calibrate import Calibration
    from hybrimoe_kt.device.experts import LayerExperts

__all__ = ["build_parser", "main"]

EXAMPLE = """examples:
  hybrimoe calibrate                        experts of Qwen3-30B-A3B's size
  hybrimoe calibrate --model FILE.gguf      that model's own
  hybrimoe calibrate --cpu_infer 8 --out fast.json
      and then: ktransformers --profile fast.json ...

Where both ggml and kt-kernel run, they are compared, and the faster one of them
computes experts from then on, for few tokens and for many. The profile is kept
where ktransformers looks for it, and in --out if given. It holds for the same
processor, GPU, backend and number of threads; on any other machine it is
refused. Nothing else should be running meanwhile.
"""
_SHAPE = {"num_experts": 64, "top_k": 8, "hidden": 2048, "inter": 768}
_MAX_TOKENS = 512
_WIDE = 1.5


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `hybrimoe calibrate`."""
    parser = Parser(
        prog="hybrimoe calibrate",
        description="Measure CPU experts, GPU experts and the link between them, for better plans.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="GGUF", help="measure with the experts of this file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the profile here (JSON)")
    parser.add_argument("--accelerator", default="auto", metavar="NAME", help=accelerators.forms())
    parser.add_argument(
        "--cpu_backend", "--cpu-backend", default=DEFAULT_CPU, metavar="NAME",
        help=f"measure one alone: {', '.join(CPU_BACKENDS)}, or module:Class (default: {DEFAULT_CPU} compares)",
    )  # fmt: skip
    parser.add_argument(
        "--ggml_library", "--ggml-library", default="", metavar="PATH",
        help="another build of ggml: its directory, or one library",
    )  # fmt: skip
    parser.add_argument(
        "--cpu_infer", "--cpu-infer", type=int, default=0, metavar="N",
        help="threads for CPU experts (default: all cores, beside a GPU all but two)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="measurements of each thing (default: 15)")
    parser.add_argument("--json", action="store_true", help="print the profile and every sample as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hybrimoe calibrate`; raises HybriMoEError, which the dispatcher prints with exit code 2."""
    options = build_parser().parse_args(argv)
    if options.repeats < 1:
        raise ConfigError(f"--repeats is {options.repeats}; give 1 or more")
    check_writable(options.out, "--out")
    from hybrimoe_kt.device.calibrate import profile_path

    errors = Console(stderr=True, highlight=False)
    found, closing = _measure(options, errors)
    kept = found.save(profile_path(found.profile.machine))
    if options.out is not None:
        found.save(options.out)
    if options.json:
        samples = {
            name: {"median_s": s.median_s, "p10_s": s.low_s, "p90_s": s.high_s, "count": s.count}
            for name, s in found.samples.items()
        }
        result = {"profile": json.loads(found.text), "samples": samples, "verdict": found.verdict, "cpu": closing}
        print(json.dumps(result, indent=2))
        return 0
    console = Console(highlight=False, markup=False)
    _show(found, console)
    console.print(f"written: {kept}" + (f" and {options.out}" if options.out else ""), soft_wrap=True)
    console.print(closing)
    return 0


def _measure(options: argparse.Namespace, console: Console) -> tuple[Calibration, str]:
    """What was measured, and in one line who will compute on the CPU."""
    from hybrimoe_kt.backends.ggml.library import choose_library
    from hybrimoe_kt.config import ExpertOptions
    from hybrimoe_kt.device.calibrate import calibrate
    from hybrimoe_kt.device.choose import choose_accelerator
    from hybrimoe_kt.device.host_store import HostStore
    from hybrimoe_kt.runtime.assembly import make_cpu_backend, make_gpu_backend

    chosen = ExpertOptions(
        accelerator=options.accelerator,
        cpu_backend=options.cpu_backend,
        ggml_library=options.ggml_library,
        cpu_threads=options.cpu_infer,
        max_chunk_tokens=_MAX_TOKENS,
    )
    choose_library(chosen.ggml_library)
    experts = _experts_of(options.model) if options.model is not None else _random_experts()
    store = HostStore()
    store.add(experts)
    accelerator = choose_accelerator(chosen.accelerator)
    cpu = make_cpu_backend(chosen, beside_accelerator=accelerator is not None)
    cpu.add_layer(experts)
    gpu = make_gpu_backend(chosen, accelerator, store) if accelerator is not None else None
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("measuring", total=None)
        found = calibrate(
            store, experts.layer, cpu, accelerator, gpu, max_tokens=_MAX_TOKENS, repeats=options.repeats,
            progress=lambda what: progress.update(task, description=f"measuring {what}"),
        )  # fmt: skip
    return found, _closing(cpu, experts, found.profile.cpu_backends)


def _closing(cpu: CpuBackend, experts: LayerExperts, compared: CandidateSeconds) -> str:
    """Who computes experts on the CPU from now on, and why."""
    from hybrimoe_kt.backends.cpu_auto import AutoBackend, candidates_for, chosen, in_words, set_aside

    if not isinstance(cpu, AutoBackend):
        return f"measured with --cpu_backend {cpu.name}: name it again, or calibrate without it"
    candidates = candidates_for(experts)
    takes = in_words(chosen(compared, candidates))
    if len(candidates) > 1:
        why = f"of {', '.join(candidates)}; another than the first must be faster by a fifth"
        return f"--cpu_backend auto (the default) takes {takes}, {why}"
    others = "; ".join(dict.fromkeys(set_aside(experts).values()))
    return f"--cpu_backend auto (the default) takes {takes}, with nothing to compare: {others}"


def _show(found: Calibration, console: Console) -> None:
    heads = "measured", "median ms", "10 % below", "10 % above"
    table = _numbers(*heads, title=found.profile.machine)
    compared = _compared(found)
    for name, sample in found.samples.items():
        if name not in compared:
            table.add_row(name, *map(_milliseconds, (sample.median_s, sample.low_s, sample.high_s)))
    console.print(table)
    if compared:
        _show_compared(found.profile.cpu_backends, console)
    if found.verdict:
        console.print(found.verdict)
    if found.spread > _WIDE:
        said = f"measurements spread by a factor of {found.spread:.1f}: something else was running"
        console.print(f"{said}, repeat when alone")
    slowdown = found.profile.cpu_slowdown_while_link_busy
    if slowdown > 1.0:
        console.print(f"CPU experts take {slowdown:.2f} times as long while the link is busy")


def _compared(found: Calibration) -> set[str]:
    """Names of the samples that compare CPU backends."""
    from hybrimoe_kt.device.calibrate import compared_sample

    return {compared_sample(name, load) for name, times in found.profile.cpu_backends.items() for load in times}


def _show_compared(backends: CandidateSeconds, console: Console) -> None:
    """A column for each backend, a row for each number of tokens; the fastest of a row is marked."""
    table = _numbers("tokens", *backends, title="one expert on the CPU, median ms; * the fastest")
    for load in sorted({load for times in backends.values() for load in times}):
        seconds = [times.get(load) for times in backends.values()]
        least = min(s for s in seconds if s is not None)
        cells = ("" if s is None else f"{_milliseconds(s)}{' *' if s == least else '  '}" for s in seconds)
        table.add_row(str(load), *cells)
    console.print(table)


def _numbers(*heads: str, title: str) -> Table:
    """A table whose columns but the first hold numbers."""
    table = Table(*heads, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _experts_of(path: Path) -> LayerExperts:
    """The first layer of routed experts in a file."""
    from hybrimoe_kt.host.hf.sources import experts_of
    from hybrimoe_kt.weights.expert_layers import expert_layers
    from hybrimoe_kt.weights.gguf_file import GgufFile

    file = GgufFile(path)
    return experts_of(file).layer_experts(**expert_layers(file)[0]._asdict())


def _random_experts() -> LayerExperts:
    """Experts of Qwen3-30B-A3B's shape in Q4_K: 64 of 2.65 MB, more than any cache holds."""
    import torch
    from gguf import GGMLQuantizationType

    from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
    from hybrimoe_kt.quants import row_bytes

    kind = int(GGMLQuantizationType.Q4_K)

    def matrix(rows: int, columns: int) -> ExpertMatrix:
        data = torch.randint(0, 256, (_SHAPE["num_experts"], rows * row_bytes(kind, columns)), dtype=torch.uint8)
        blocks = data.view(-1, 144)
        blocks[:, :4] = torch.tensor([1e-3, 1e-3], dtype=torch.float16).view(torch.uint8)  # scales that stay finite
        return ExpertMatrix(data, kind, rows, columns)

    hidden, inter = _SHAPE["hidden"], _SHAPE["inter"]
    gate, up, down = matrix(inter, hidden), matrix(inter, hidden), matrix(hidden, inter)
    return LayerExperts(0, _SHAPE["num_experts"], _SHAPE["top_k"], hidden, inter, gate, up, down)
