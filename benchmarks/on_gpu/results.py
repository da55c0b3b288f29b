"""What has been found so far: one JSON file, written anew after every row, and the report made of it.

Steps are processes of their own and take turns, so there is one writer at a time. A row of a run that was not clean
keeps no times: neither file can show what the record does not hold.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.clean import what_happened

from . import report
from .plan import Plan

if TYPE_CHECKING:
    from hybrimoe_kt.runtime.health import Health

__all__ = ["Results"]

MEASURED, LEFT_OUT, FAILED, UNCLEAN = "measured", "left out", "failed", "unclean"


class Results:
    """`results.json` and `report.md` in a folder."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data

    @classmethod
    def begin(cls, plan: Plan) -> Results:
        """Start anew in the plan's folder."""
        folder = Path(plan.out)
        folder.mkdir(parents=True, exist_ok=True)
        results = cls(folder, {"plan": plan.as_dict(), "steps": {}, "rows": []})
        results.save()
        return results

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Go on with what another process has written."""
        return cls(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))

    @property
    def plan(self) -> Plan:
        return Plan.from_dict(self.data["plan"])

    def add(
        self,
        step: str,
        table: str,
        name: str,
        values: dict[str, Any] | None = None,
        *,
        health: Health | None = None,
        note: str = "",
    ) -> None:
        """Keep a row; without its values if `health`, of the runtime they were measured on, is not clean."""
        row = {"step": step, "table": table, "name": name, "state": MEASURED, "values": values or {}, "note": note}
        said = what_happened(health) if health is not None else ""
        if said and health is not None:
            row |= {"state": UNCLEAN, "values": {}, "note": said, "health": health.as_dict()}
        self._keep(row)

    def leave_out(self, step: str, table: str, name: str, why: str) -> None:
        """Keep a row that says why there is nothing."""
        self._keep({"step": step, "table": table, "name": name, "state": LEFT_OUT, "values": {}, "note": why})

    def fail(self, step: str, table: str, name: str, why: str) -> None:
        """Keep a row that says what went wrong."""
        self._keep({"step": step, "table": table, "name": name, "state": FAILED, "values": {}, "note": why})

    def _keep(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        said = " ".join(f"{key}={_short(value)}" for key, value in row["values"].items())
        print(f"{row['table']}: {row['name']}: {said or row['state']} {row['note']}", flush=True)
        self.save()

    def note_step(self, name: str, **facts: Any) -> None:
        """Keep how a step went: title, state, seconds, limit_s, note, log."""
        self.data["steps"].setdefault(name, {}).update(facts)
        self.save()

    def rows(self, step: str, table: str | None = None) -> list[dict[str, Any]]:
        return [row for row in self.data["rows"] if row["step"] == step and table in (None, row["table"])]

    def save(self) -> None:
        """Write both files, each as a whole or not at all."""
        _replace(self.folder / "results.json", json.dumps(self.data, indent=1) + "\n")
        _replace(self.folder / "report.md", report.render(self.data))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
