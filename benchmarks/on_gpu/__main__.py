"""Whether the program is right on this machine's GPU, and how fast: the one command for anybody with a card.

    python -m benchmarks.on_gpu                          the card found, eight minutes, three models
    python -m benchmarks.on_gpu --quick                  two minutes, one model
    python -m benchmarks.on_gpu --minutes 30 --models mixtral-8x7b --llama-bench ~/llama.cpp/build/bin/llama-bench
    python -m benchmarks.on_gpu --accelerator emulated --quick      without a card: shows what there is to see

Steps: the machine, the project's tests, the link, the kernels, whole models with random weights (RAM or disk for files
of 10 to 28 GB, fewer layers where there is no room), llama.cpp on the same files, plans on the clock. Every step is a
process with a time limit; a failing one does not stop the rest. report.md and results.json in the output folder are
complete at any moment. Nothing is downloaded or installed.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .plan import MODELS, Plan, steps_of, visible_card
from .results import Results
from .runner import run_steps

QUICK_MINUTES = 2.0
_ACCELERATORS = "cuda, cuda:N (ROCm as well), or emulated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 0 if every step was done and nothing failed, 1 otherwise, 2 if there is nothing to run on."""
    options = parser().parse_args(arguments)
    if options.step:
        return _run_step(options)
    refusal = _refusal(options)
    if refusal:
        print(f"benchmarks.on_gpu: {refusal}", file=sys.stderr)
        return 2
    plan = Plan(
        accelerator=(options.accelerator or "cuda").partition(":")[0],
        card="" if options.accelerator == "emulated" else visible_card(int(options.accelerator.partition(":")[2] or 0)),
        models=tuple(dict.fromkeys(options.models or (MODELS[:1] if options.quick else MODELS))),
        out=str(Path(options.out).resolve()),
        minutes=options.minutes or (QUICK_MINUTES if options.quick else 8.0),
        quick=options.quick,
        keep_model=options.keep_model,
        llama_bench=str(Path(options.llama_bench).expanduser().resolve()) if options.llama_bench else "",
    )
    results = Results.begin(plan)
    try:
        results = run_steps(plan, steps_of(plan), results, lambda line: print(line, flush=True))
    finally:
        if not plan.keep_model:
            _remove_models(Path(plan.out))
    print(f"\n{_closing(results)}\nreport: {results.folder / 'report.md'}")
    if options.write_docs:
        from .docs import PAGE, page

        PAGE.write_text(page(results.data), encoding="utf-8")
        print(f"written: {PAGE}")
    return 0 if _is_good(results) else 1


def parser() -> argparse.ArgumentParser:
    """What the command line takes; its help is the page's."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__, formatter_class=raw)
    made.add_argument("--minutes", type=float, metavar="N", help="most that all steps take together (default 8)")
    made.add_argument(
        "--quick", action="store_true", help=f"{QUICK_MINUTES:.0f} minutes and one model, unless more is asked for"
    )
    made.add_argument("--accelerator", default="", metavar="NAME", help=f"{_ACCELERATORS} (default: the card found)")
    made.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)} (default: all)"
    )
    made.add_argument(
        "--out", default=".cache/on_gpu", metavar="FOLDER", help="report, results and logs (default %(default)s)"
    )
    made.add_argument("--write-docs", action="store_true", help="write docs/gpu.md from what was found")
    made.add_argument(
        "--keep-model", action="store_true", help="do not delete the generated files; they lie in the output folder"
    )
    made.add_argument(
        "--llama-bench", default="", metavar="PATH", help="llama.cpp's benchmark (default: the one on PATH)"
    )
    made.add_argument("--step", help=argparse.SUPPRESS)
    made.add_argument("--limit-s", type=float, default=60.0, help=argparse.SUPPRESS)
    return made


def _refusal(options: argparse.Namespace) -> str:
    """Why nothing can be run, in one sentence; empty if it can."""
    name = options.accelerator
    if options.minutes is not None and not 0 < options.minutes <= 24 * 60:
        return f"--minutes {options.minutes:g} is no time to measure in; give more than 0"
    if options.llama_bench and not Path(options.llama_bench).expanduser().is_file():
        return f"--llama-bench {options.llama_bench}: there is no such file"
    if name == "emulated":
        return ""
    kind, _, number = name.partition(":")
    if name and (kind != "cuda" or (":" in name and not number.isdigit())):
        return f"accelerator {name!r} is not one this can measure; give {_ACCELERATORS}"
    import torch

    if not torch.cuda.is_available():
        return (
            "torch finds no CUDA or ROCm card on this machine; give --accelerator emulated --quick to see what the "
            "command does, its times mean nothing then"
        )
    if number and int(number) >= torch.cuda.device_count():
        return f"there is no {name}: torch finds {torch.cuda.device_count()} cards, counted from 0"
    return ""


def _run_step(options: argparse.Namespace) -> int:
    """What a child process does; see `runner`."""
    ends_s = time.monotonic() + options.limit_s
    results = Results.read(Path(options.out))
    plan = results.plan
    kind, _, model = options.step.partition(":")
    if kind == "machine":
        from .machine import run
    elif kind == "tests":
        from .correctness import run
    elif kind == "link":
        from .link import run
    elif kind == "kernels":
        from .kernels import run
    elif kind == "clock":
        from .clock import run
    elif kind == "llama":
        from .llama import run as run_llama

        run_llama(plan, results, ends_s, model)
        return 0
    else:
        from .model import run as run_model

        run_model(plan, results, ends_s, model)
        return 0
    run(plan, results, ends_s)
    return 0


def _remove_models(folder: Path) -> None:
    """Delete every generated file that the results tell of."""
    for said in Results.read(folder).data["steps"].values():
        if file := said.get("file"):
            Path(file).unlink(missing_ok=True)


def _is_good(results: Results) -> bool:
    steps_done = all(said.get("state") == "done" for said in results.data["steps"].values())
    rows = results.data["rows"]
    tests_failed = any(row["table"] == "tests" and row["values"].get("failed") for row in rows)
    return steps_done and not tests_failed and not any(row["state"] in ("failed", "unclean") for row in rows)


def _closing(results: Results) -> str:
    rows = results.data["rows"]
    counts = {
        state: sum(row["state"] == state for row in rows) for state in ("measured", "left out", "failed", "unclean")
    }
    return f"{len(rows)} rows: " + ", ".join(f"{number} {state}" for state, number in counts.items())


def _end_in_order() -> None:
    """Let signals that end a process unwind it: else its step would go on, and a model's file stay in RAM."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    _end_in_order()
    sys.exit(main())
