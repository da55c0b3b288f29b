"""`python -m tools.kernel_lab`: compile, judge, and with --write the table. Exits with 1 on a rejection."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from hybrimoe_kt.kernels.targets import TARGETS

from .build import Measurement, measure
from .cases import Case, cases_for, mixtures_for
from .checks import rejections
from .table import markdown

REDUCED_TARGETS = ("sm_86", "gfx1100")
REDUCED_CASES = re.compile(r"Q4_K|Q4_K fp16 x\d+|Q6_K bf16 x16|Q4_K 8x32 x1|(128|512) fp16")
"""The reduced form: the commonest type on a card of NVIDIA's and one of AMD's, a second of a core each."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.write and (options.reduced or options.target or options.mixtures):
        parser.error("--write wants every kernel of every target; leave out --reduced, --target and --mixtures")
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    started = time.monotonic()
    cases = mixtures_for if options.mixtures else cases_for
    jobs = [(case, name) for name in options.target or _targets(options.reduced) for case in cases(TARGETS[name])]
    if options.reduced:
        jobs = [(case, name) for case, name in jobs if REDUCED_CASES.fullmatch(case.variant)]
    findings = _measure_all(jobs, Path(options.cache), options.jobs)
    problems = [problem for case, found in findings for problem in rejections(case, found)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if options.write and not problems:
        import triton

        Path(options.write).write_text(markdown(findings, triton.__version__), encoding="utf-8")
    print(f"{len(findings)} kernels, {len(problems)} rejections, {time.monotonic() - started:.0f} s")
    return 1 if problems else 0


def _targets(reduced: bool) -> Sequence[str]:
    return REDUCED_TARGETS if reduced else tuple(TARGETS)


def _measure_all(jobs: Sequence[tuple[Case, str]], cache: Path, workers: int) -> list[tuple[Case, Measurement]]:
    cases, names = zip(*jobs, strict=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = pool.map(measure, cases, names, [cache] * len(jobs), chunksize=4)
        return list(zip(cases, found, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_lab",
        description="Compile every kernel for every GPU, no GPU needed, and reject what would run badly.",
        epilog="example: python -m tools.kernel_lab --target sm_86 --target sm_90",
    )
    parser.add_argument("--reduced", action="store_true", help="a few kernels on three targets, for every test run")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target; may be repeated")
    parser.add_argument("--mixtures", action="store_true", help="gate and up in two types, instead of in one")
    parser.add_argument("--write", metavar="FILE", help="write the table there when nothing is rejected")
    parser.add_argument("--cache", metavar="DIR", default=".cache/kernels", help="measurements of earlier runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile so many at once")
    return parser


if __name__ == "__main__":
    sys.exit(main())
