"""Runs steps one after the other, each in a process of its own with a time limit; none stops the next."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .plan import Plan, Step, environment
from .results import Results

__all__ = ["run_steps"]

ROOT = Path(__file__).parents[2]
GRACE_S = 4.0
"""A step is told to be done this long before it is cut, so that it can still say what it did not come to."""
DONE, FAILED, CUT, NOT_BEGUN = "done", "failed", "cut", "not begun"

Command = Callable[[Step, float], Sequence[str]]


def run_steps(
    plan: Plan,
    steps: Sequence[Step],
    results: Results,
    say: Callable[[str], None] = print,
    command: Command | None = None,
) -> Results:
    """Run all `steps`; returns what they have found. `say` gets a line before and after each."""
    ends_s = time.monotonic() + 60 * plan.minutes
    command = command or (lambda step, limit_s: _own_command(plan, step, limit_s))
    for number, step in enumerate(steps, start=1):
        left_s = max(0.0, ends_s - time.monotonic())
        limit_s = step.limit_s(left_s)
        head = f"[{number}/{len(steps)}] {step.title}"
        if not limit_s:
            why = f"{left_s:.0f} s were left, too few: give more --minutes, or fewer --models"
            results.note_step(step.name, title=step.title, state=NOT_BEGUN, note=why)
            say(f"{head}: not begun, {why}")
            continue
        say(f"{head}: at most {limit_s:.0f} s ...")
        log = results.folder / f"{step.name.replace(':', '-')}.log"
        results.note_step(step.name, title=step.title, state="running", limit_s=limit_s, log=log.name)
        state, seconds, note = run_one(command(step, max(1.0, limit_s - GRACE_S)), log, limit_s, environment(plan))
        results = Results.read(results.folder)
        results.note_step(step.name, state=state, seconds=seconds, note=note)
        say(f"{head}: {state} after {seconds:.0f} s, {len(results.rows(step.name))} rows{'; ' + note if note else ''}")
    return results


def _own_command(plan: Plan, step: Step, limit_s: float) -> list[str]:
    own = [sys.executable, "-m", "benchmarks.on_gpu"]
    return [*own, "--step", step.name, "--out", plan.out, "--limit-s", f"{limit_s:.0f}"]


def run_one(command: Sequence[str], log: Path, limit_s: float, env: dict[str, str]) -> tuple[str, float, str]:
    """Run a command; return its state, its seconds, and what its log says last where it failed."""
    began, child = time.monotonic(), None
    with open(log, "wb") as out:
        try:
            with _signals_held():  # one that ended us while a child begins would leave it behind
                child = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=env,
                    cwd=ROOT,
                    start_new_session=True,
                )
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return CUT, _seconds(began), f"it ran past its {limit_s:.0f} s, {log.name} says how far it came"
        finally:
            if child is not None:
                _end(child)
    if code == 0:
        return DONE, _seconds(began), ""
    return FAILED, _seconds(began), f"{_last_line(log)} (exit code {code}, all of it in {log.name})"


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """What would end this process meanwhile does so afterwards."""
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            os.kill(os.getpid(), number)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the step and everything it started: a process group of their own, which outlives a step that broke off."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _seconds(began: float) -> float:
    return round(time.monotonic() - began, 1)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
