"""`hybrimoe doctor`: what this machine has, which kernels run on it, and what to do next."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hybrimoe_kt.errors import HostCompatibilityError
from hybrimoe_kt.host.doctor.diagnosis import diagnose
from hybrimoe_kt.sizes import parse_bytes, size_text
from hybrimoe_kt.weights.overrides import parse_overrides

from .chat_output import visible
from .terminal import Parser, whole

__all__ = ["build_parser", "main"]

EXAMPLES = """examples:
  hybrimoe doctor                     this machine and what is installed
  hybrimoe doctor --model FILE.gguf   and which kernels serve that model
  hybrimoe doctor --model FILE.gguf --card_bytes 24GiB --context_tokens 32768
                                      and where the memory of such a GPU goes
  hybrimoe doctor --json              the same as data, for a bug report

Nothing is computed, installed or written; of a model only the header is read.
The exit code is 0 whatever is found (the JSON says ready: true or false) and 2
when the file is no model that could be run.
"""
_USES = {"flashinfer-python": "for attention of captured steps and prompts, on CUDA"}
_OPTIONAL = "kt-kernel"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `hybrimoe doctor`."""
    parser = Parser(
        prog="hybrimoe doctor",
        description="Show what this machine has, which kernels run on it, and what to do next.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="GGUF", help="also say which kernels serve this file's experts")
    parser.add_argument(
        "--override_kv", "--override-kv", action="append", default=[], metavar="KEY=TYPE:VALUE",
        help="metadata in the place of the file's, as in llama.cpp",
    )  # fmt: skip
    parser.add_argument(
        "--context_tokens", "--context-tokens", type=whole(1), metavar="N",
        help="plan the GPU's memory for conversations of so many; default: 8192, the model's own or what has room",
    )  # fmt: skip
    parser.add_argument(
        "--card_bytes", "--card-bytes", type=_bytes, default=0, metavar="SIZE",
        help="plan for a GPU of this size (24GiB), which need not be here",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hybrimoe doctor`; raises HybriMoEError, which the dispatcher prints with exit code 2."""
    options = build_parser().parse_args(argv)
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print when they are imported
        changes, planned = parse_overrides(options.override_kv), (options.context_tokens, options.card_bytes)
        report = examine(options.model, changes, *planned)
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    _show(report, Console(highlight=False))
    return 0


def _bytes(text: str) -> int:
    """Read "24GiB" or a plain number."""
    found = int(text) if text.isdecimal() else parse_bytes(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, valid: bytes (1048576, 24GiB)")
    return found


def examine(
    model: Path | None,
    changes: Mapping[str, Any] | None = None,
    context_tokens: int | None = None,
    card_bytes: int = 0,
) -> dict[str, Any]:
    """Return every fact and the verdict; ModelError for a file that is no model. Arguments as of `report_model`."""
    from hybrimoe_kt.host.doctor.machine import report_machine

    report = report_machine()
    report["model"] = _judge(model, report, changes or {}, context_tokens, card_bytes) if model is not None else None
    return report | {"verdict": diagnose(report)}


def _judge(
    model: Path, machine: Mapping[str, Any], changes: Mapping[str, Any], context_tokens: int | None, card_bytes: int
) -> dict[str, Any]:
    try:
        from hybrimoe_kt.host.doctor.model import report_model
    except (ImportError, OSError, HostCompatibilityError) as error:
        return {"file": str(model), "problem": f"reading it needs more than is installed: {error}"}
    return report_model(model, machine, changes, context_tokens=context_tokens, card_bytes=card_bytes)


def _show(report: Mapping[str, Any], console: Console) -> None:
    title = f"hybrimoe_kt {report['hybrimoe_kt']}"
    table = Table("part", Column("found", overflow="fold"), title=title, title_justify="left")
    for name, found in _rows(report):
        table.add_row(name, Text(visible(found)))
    console.print(table)
    if report["model"] is not None and not report["model"]["problem"]:
        _show_model(report["model"], console)
    verdict = report["verdict"]
    for finding in verdict["findings"][1:]:
        console.print(Text(f"also: {visible(finding['text'])}", style="dim"))
    style = "green" if not verdict["findings"] else "yellow" if verdict["ready"] else "red"
    console.print(Text(visible(verdict["text"]), style=style))
    console.print(Text(f"next: {visible(verdict['next'])}", style="bold"), soft_wrap=True)


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _machine_rows(report)
    for name, library in report["libraries"].items():
        notes = library["version"], library["problem"], _USES.get(name)
        is_spared = name == _OPTIONAL and library["version"] is None
        yield name, _spared(report) if is_spared else ", ".join(filter(None, notes))
    yield from _cpu_rows(report)
    gpu = report["gpu_kernels"]
    there = "" if report["accelerators"]["devices"] else "no GPU here; "
    types = f"{there}Triton kernels run on {gpu['device']}: {', '.join(gpu['types'])}"
    yield "GPU experts", types if gpu["runs"] else f"{there}no Triton kernels: {gpu['problem']}"
    yield "attention", _attention_row(report["attention"])
    yield "calibration", _profile_row(report)
    for name, run in report["last_runs"].items():
        yield f"last run on {name}", _last_run_row(run)


def _spared(report: Mapping[str, Any]) -> str:
    has_build = report["cpu_kernels"][_OPTIONAL]["has_build"]
    return "not installed, optional" if has_build else "no build for this machine or Python, optional"


def _cpu_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Which library computes what on the CPU, and which of them experts are given to."""
    cpu = report["cpu_kernels"]
    ggml, kt_kernel, auto = cpu["ggml"], cpu["kt-kernel"], cpu["auto"]
    if ggml["runs"]:
        built = f"built for {' '.join(ggml['instructions']) or 'any processor'}"
        yield "ggml", f"{ggml['version']}, {built}, computes {', '.join(ggml['types'])}; {ggml['file']}"
    else:
        yield "ggml", f"does not run: {ggml['problem']}"
    if kt_kernel["runs"]:
        yield "llamafile", f"kt-kernel's, computes {', '.join(kt_kernel['types'])}"
    elif report["libraries"][_OPTIONAL]["version"] is not None:
        yield "llamafile", f"does not run: {kt_kernel['problem']}"
    yield "CPU experts", f"{auto['takes']} ({auto['reason']})" if auto["takes"] else str(auto["problem"])
    yield "dense weights", _dense_weights(report)


def _dense_weights(report: Mapping[str, Any]) -> str:
    """How they are kept, on a CPU and on the GPU that is here."""
    on_cpu = "as in the file" if report["cpu_kernels"]["keeps_dense_packed"] else "floats"
    if not report["accelerators"]["devices"]:
        return f"{on_cpu} on the CPU"
    return f"{on_cpu} on the CPU, {'as in the file' if report['gpu_kernels']['runs'] else 'floats'} on the GPU"


def _machine_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    cpu, memory, found = report["cpu"], report["memory"], report["accelerators"]
    yield "Python", report["python"]
    if cpu["problem"]:
        yield "processor", cpu["problem"]
    else:
        yield "processor", cpu["model"]
        features = " ".join(cpu["features"]) or "none that expert kernels use"
        yield "features", f"{features} ({cpu['features_from']})" if cpu["features_from"] else "not known"
        nodes = cpu["numa_nodes"]
        numa = "NUMA nodes not known" if nodes is None else f"{nodes} NUMA node{'s' * (nodes > 1)}"
        yield "cores", f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical, {numa}"
    yield "memory", memory["problem"] or _memory_row(memory)
    yield "accelerators", "; ".join(map(_device_row, found["devices"])) or _no_device_row(found)


def _memory_row(memory: Mapping[str, Any]) -> str:
    parts = [f"{size_text(memory['total_bytes'])}, {size_text(memory['available_bytes'])} available"]
    if memory["container_limit_bytes"] is not None:
        parts.append(f"limited to {size_text(memory['container_limit_bytes'])} by the container")
    limit = "no limit" if memory["page_lock_unlimited"] else size_text(memory["page_lock_limit_bytes"])
    return "; ".join([*parts, f"page-locking (ulimit -l): {limit}"])


def _device_row(device: Mapping[str, Any]) -> str:
    if device["problem"]:
        return f"{device['name']}: {device['problem']}"
    capability = device["architecture"] or (
        f"compute capability {device['compute_capability']}" if device["compute_capability"] else ""
    )
    memory = f"{size_text(device['memory_free_bytes'])} of {size_text(device['memory_total_bytes'])} free"
    return ", ".join(filter(None, (f"{device['name']} {device['model']}", memory, capability)))


def _no_device_row(found: Mapping[str, Any]) -> str:
    if found["torch_built_for"] is None:
        return f"not known: {found['problem']}"
    driver = "; an NVIDIA driver is here" if found["nvidia_driver"] else ""
    problem = f": {found['problem']}" if found["problem"] else ""
    return f"none that torch (built for {found['torch_built_for']}) sees{problem}{driver}"


def _attention_row(attention: Mapping[str, Any]) -> str:
    """Of captured steps, on each device, with the reasons against what comes before it."""
    if attention["problem"]:
        return f"not known: {attention['problem']}"
    parts = []
    for found in attention["devices"]:
        reasons = "; ".join(dict.fromkeys(filter(None, found["better"].values())))
        parts.append(f"{found['takes']} on {found['device']}" + (f" ({reasons})" if reasons else ""))
    return ", ".join(parts)


def _profile_row(report: Mapping[str, Any]) -> str:
    profile = report["profile"]
    if profile["problem"]:
        return str(profile["problem"])
    if profile["measured"]:
        return f"measured on {profile['date']}"
    cpu = report["cpu_kernels"]
    is_needed = report["accelerators"]["devices"] or (cpu["ggml"]["runs"] and cpu["kt-kernel"]["runs"])
    return "not measured" if is_needed else "not measured, not needed without an accelerator"


def _last_run_row(run: Mapping[str, Any]) -> str:
    from hybrimoe_kt.host.last_runs import failure_text

    return f"{failure_text(run)}; {run['model']}, {run['date']}"


def _show_model(model: Mapping[str, Any], console: Console) -> None:
    shape = f"{model['num_expert_layers']} layers of {model['num_experts']} experts, {model['top_k']} a token"
    for number, kind in enumerate(model["kinds"]):
        layers = f"layer{'s' * (len(kind['layers']) > 1)} {_ranges(kind['layers'])}"
        title = f"{model['name']} ({model['architecture']}): {shape}\n{layers}" if number == 0 else layers
        gpu = "on a GPU (none here; as on compute capability 8.0)" if kind["gpu_is_assumed"] else "on the GPU"
        table = Table("experts", "on the CPU", gpu, title=Text(visible(title)), title_justify="left")
        for row in kind["tensors"]:
            kernels = row["gpu_decode_kernel"], row["gpu_prefill_kernel"]
            table.add_row(f"{row['tensor']} {row['type']}", row["cpu_kernel"], _kernels(*kernels))
        console.print(table)
        for refusal in filter(None, (kind["cpu_refusal"], kind["gpu_refusal"])):
            console.print(Text(f"because {visible(refusal)}", style="dim"))
    console.print(Text(_memory_line(model)))
    if model["plan"] is not None:
        _show_plan(model["plan"], console)
    if model["refusal"]:
        console.print(Text(visible(f"it would not load: {model['refusal']}"), style="yellow"))
    for line in _unused_lines(model["unused"]):
        console.print(Text(visible(line), style="dim"))


def _show_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Where a card's memory goes."""
    table = Table(f"{plan['card']}, {size_text(plan['card_bytes'])}", Column("planned", justify="right"))
    for name, text in plan["rows"]:
        table.add_row(name, text)
    console.print(table)
    if plan["refusal"]:
        console.print(Text(visible(plan["refusal"]), style="yellow"))


def _unused_lines(unused: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """What the file says to no effect, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for each in unused:
        by_reason.setdefault(each["reason"], []).append(each["name"])
    for reason, names in sorted(by_reason.items()):
        some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        yield f"not used ({reason or 'nor by llama.cpp'}): {some}"


def _kernels(decode: str | None, prefill: str | None) -> str:
    if decode is None:
        return "none, they stay on the CPU"
    return "torch: dequantises and multiplies" if decode == "torch" else f"{decode}\n{prefill}"


def _memory_line(model: Mapping[str, Any]) -> str:
    kind = model["dense_dtype"].removeprefix("as ")
    dense = f"{size_text(model['dense_bytes'])} dense weights as {kind} on {model['dense_on']}"
    host = (
        f"{size_text(model['host_bytes'])} of host memory wanted, {size_text(model['host_available_bytes'])} available"
    )
    line = f"memory: {size_text(model['expert_bytes'])} experts, {dense}; {host}"
    share = model["accelerator_expert_share"]
    return line if share is None else f"{line}; {share:.0%} of the experts fit on {model['dense_on']}"


def _ranges(numbers: Iterable[int]) -> str:
    """Write 0, 1, 2, 5 as "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
