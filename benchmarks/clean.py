"""Times are printed of clean runs only: where an accelerator fails the CPU answers, which only the clock shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrimoe_kt.runtime import Health, Runtime

__all__ = ["refuse_unless_clean", "what_happened"]


def what_happened(health: Health) -> str:
    """The word and the counts, empty for a clean run: "failed: cuda: 3 failed steps (out of memory)"."""
    from hybrimoe_kt.host.last_runs import failure_text

    if health.is_clean:
        return ""
    counts = {name: failure_text(counted) for name, counted in health.as_dict()["accelerators"].items()}
    said = [f"{name}: {text}" for name, text in counts.items() if text]
    if health.word == "fallback":
        said.append(f"hybrid plans were given up for {health.fallback}")
    return f"{health.word}: {'; '.join(said)}"


def refuse_unless_clean(runtime: Runtime) -> None:
    """Raise SystemExit with one sentence if anything failed since the start: times are not of what was asked for."""
    said = what_happened(runtime.health())
    if said:
        raise SystemExit(f"no times: the run was not clean ({said}); they would be the CPU's, which answered instead")
