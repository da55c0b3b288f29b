"""Accelerators whose last run was not clean, kept between runs so that `hybrimoe doctor` can tell of it.

One small file beside the profiles. A run never fails because of it: what cannot be read or written is left out.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrimoe_kt.device.calibrate import profile_path
from hybrimoe_kt.runtime import AcceleratorHealth, Health

__all__ = ["RunNote", "failure_text", "read_last_runs", "state_path"]

logger = logging.getLogger(__name__)

_FIELDS: Mapping[str, type] = {
    "model": str, "failed_steps": int, "shrunk": int, "given_up": bool, "last_failure": str, "date": str
}  # fmt: skip


def state_path() -> Path:
    """Where it is kept: this user's cache folder."""
    return profile_path("").parent / "last-runs.json"


def read_last_runs() -> dict[str, dict[str, Any]]:
    """Accelerator -> model, counts, last failure and date of its last run, where that was not clean."""
    try:
        found = json.loads(state_path().read_text(encoding="utf-8"))
        return {
            str(name): {field: kind(run[field]) for field, kind in _FIELDS.items()}
            for name, run in found["accelerators"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # none yet, or no file of ours


def failure_text(counts: Mapping[str, Any]) -> str:
    """What came of one accelerator in words, from an `AcceleratorHealth` as plain data; empty if nothing happened."""
    parts = []
    if steps := counts["failed_steps"]:
        parts.append(f"{steps} failed step{'s' * (steps != 1)}")
    if times := counts["shrunk"]:
        parts.append(f"cache shrunk {'once' if times == 1 else f'{times} times'}")
    if counts["given_up"]:
        parts.append("given up")
    if parts and counts["last_failure"]:
        parts[0] += f" ({counts['last_failure']})"
    return ", ".join(parts)


class RunNote:
    """Keeps the file in step with one run's health."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._noted: dict[str, tuple[Any, ...]] | None = None
        self._kinds: list[tuple[bool, ...]] = []

    def at_step(self, health: Health) -> None:
        """After a step: write where something happened that had not happened before. The process may not end well."""
        kinds = [_kind(accelerator) for accelerator in health.accelerators.values()]
        if kinds != self._kinds and any(map(any, kinds)):
            self.at_end(health)

    def at_end(self, health: Health) -> None:
        """After an answer: write what has changed; an accelerator's clean run takes out what the file has of it."""
        self._kinds = [_kind(accelerator) for accelerator in health.accelerators.values()]
        counts = {name: _counts(accelerator) for name, accelerator in health.accelerators.items()}
        if counts != self._noted:
            self._noted = counts
            try:
                self._write(health)
            except (OSError, ValueError):
                logger.debug("%s cannot be written", state_path(), exc_info=True)

    def _write(self, health: Health) -> None:
        before = read_last_runs()
        kept = {name: run for name, run in before.items() if name not in health.accelerators}
        date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        for name, accelerator in health.accelerators.items():
            if not accelerator.is_clean:
                kept[name] = {
                    "model": self._model,
                    "failed_steps": accelerator.failed_steps,
                    "shrunk": accelerator.shrunk,
                    "given_up": accelerator.given_up,
                    "last_failure": accelerator.last_failure,
                    "date": date,
                }
        if kept != before:
            _replace(state_path(), json.dumps({"accelerators": kept}, indent=2) + "\n")


def _kind(accelerator: AcceleratorHealth) -> tuple[bool, ...]:
    return accelerator.failed_steps > 0, accelerator.shrunk > 0, accelerator.given_up


def _counts(accelerator: AcceleratorHealth) -> tuple[Any, ...]:
    return accelerator.failed_steps, accelerator.shrunk, accelerator.given_up, accelerator.last_failure


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink()
