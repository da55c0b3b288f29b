"""Step 1: the project's own tests of everything that runs on a device."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .plan import Plan, environment
from .results import Results

__all__ = ["run"]

STEP = "tests"
ROOT = Path(__file__).parents[2]
ON_A_CARD = ("tests/device", "tests/backends", "tests/kernels", "tests/host")
EMULATED = ("-m", "not slow and not gpu", "tests/device/test_slots.py")
PROCESSES = 8
"""That share the card, as in `make test-gpu`."""
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)s?\b")
_NAMED = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", re.MULTILINE)
_MOST_NAMED = 12


def run(plan: Plan, results: Results, ends_s: float) -> None:
    """Run them; one row with the counts, one for each that failed."""
    chosen = EMULATED if plan.is_emulated else ("-m", _marks(), *_in_parallel(), *ON_A_CARD)
    name = "a small selection, emulated" if plan.is_emulated else "tests on the card"
    text, code = output_of(chosen, plan, max(1.0, ends_s - time.monotonic()))
    print(text, flush=True)
    if code is None:
        done = sum(len(dots) for dots in re.findall(r"^([.sFExX]+)", text, re.MULTILINE))
        failed = sum(dots.count("F") + dots.count("E") for dots in re.findall(r"^([.sFExX]+)", text, re.MULTILINE))
        results.add(
            STEP,
            "tests",
            name,
            {"passed": done - failed, "failed": failed},
            note="cut: out of time, give more --minutes",
        )
        return
    counts = {word: int(number) for number, word in _COUNT.findall((text.strip().splitlines() or [""])[-1])}
    if not counts:
        last = (text.strip().splitlines() or ["pytest said nothing"])[-1]
        results.fail(STEP, "tests", name, f"pytest ended with code {code}: {last}")
        return
    counts["failed"] = counts.get("failed", 0) + counts.pop("error", 0)
    if not counts.get("passed") and not counts["failed"]:
        results.fail(STEP, "tests", name, f"no test ran, {counts.get('skipped', 0)} were skipped: see tests.log")
        return
    results.add(STEP, "tests", name, {"passed": 0, "skipped": 0} | counts)
    for test, why in _NAMED.findall(text)[:_MOST_NAMED]:
        results.fail(STEP, "tests", test, why or "see tests.log")


def _in_parallel() -> tuple[str, ...]:
    """Most of the time goes into compiling kernels, on the CPU."""
    return ("-n", str(PROCESSES)) if importlib.util.find_spec("xdist") else ()


def _marks() -> str:
    """Tests that need a card and, where they are marked, the kernels': pytest refuses a mark it does not know."""
    known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return "(gpu or kernels) and not slow" if '"kernels:' in known else "gpu and not slow"


def output_of(arguments: Sequence[str], plan: Plan, limit_s: float) -> tuple[str, int | None]:
    """What pytest says, and its exit code; None if it was cut."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(plan),
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace"), None
    return done.stdout.decode(errors="replace"), done.returncode
