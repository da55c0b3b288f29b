"""The Markdown page made of a results file, finished or not."""

from __future__ import annotations

from typing import Any

from .explain import EMULATED, STEPS, WHAT_TO_DO
from .plan import Plan, steps_of
from .tables import TABLES, markdown

__all__ = ["render", "sections"]

Data = dict[str, Any]


def render(data: Data) -> str:
    """The whole report."""
    return "\n\n".join(["# Measured on this machine", *sections(data)]) + "\n"


def sections(data: Data, level: int = 2) -> list[str]:
    """Everything below the title, headings beginning at `level`."""
    plan, head = Plan.from_dict(data["plan"]), "#" * level
    parts = [EMULATED] if plan.is_emulated else []
    parts += [f"{head} In short", "\n".join(f"- {line}" for line in _in_short(data))]
    parts += [f"{head} The steps", _steps(data), "What the words mean, and what to do:", WHAT_TO_DO.strip()]
    explained: set[str] = set()
    for step in steps_of(plan):
        title, text = STEPS[step.kind]
        parts.append(f"{head} {title.format(model=step.model)}")
        if step.kind not in explained:
            parts.append(text)
        explained.add(step.kind)
        parts += _tables(data, step.name, step.kind)
    return parts


def _tables(data: Data, name: str, kind: str) -> list[str]:
    shown: list[str] = []
    noted: set[str] = set()
    for table in TABLES[kind]:
        rows = [row for row in data["rows"] if row["step"] == name and row["table"] == table.source]
        if table.source in noted:  # what was not measured is said once
            rows = [row for row in rows if row["state"] == "measured"]
        if table.source == "methods":  # measured in another order, the most telling first
            rows.sort(key=lambda row: (row["name"].startswith("all"), row["name"].split(",")[0]))
        text = markdown(table, rows, notes=table.source not in noted)
        noted.add(table.source)
        if text:
            shown += [f"**{table.title}**"] if table.title else []
            shown.append(text)
    if shown:
        return shown
    said = data["steps"].get(name, {})
    return [f"Nothing: {said.get('note') or said.get('state') or 'not begun'}."]


def _steps(data: Data) -> str:
    lines = ["| step | state | seconds | of at most | rows | note |", "|---|---|--:|--:|--:|---|"]
    for step in steps_of(Plan.from_dict(data["plan"])):
        said = data["steps"].get(step.name, {})
        rows = sum(row["step"] == step.name for row in data["rows"])
        seconds, limit = (_seconds(said.get(key)) for key in ("seconds", "limit_s"))
        note = str(said.get("note", "")).replace("|", "\\|")
        lines.append(f"| {step.title} | {said.get('state', 'waiting')} | {seconds} | {limit} | {rows} | {note} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _in_short(data: Data) -> list[str]:
    rows, plan = data["rows"], Plan.from_dict(data["plan"])
    card = next((row["values"]["value"] for row in rows if row["name"] == "card"), plan.accelerator)
    lines = [f"Card: {card}", *_is_right(rows), *_unclean(rows)]
    if not plan.is_emulated:
        lines += _kernels(rows)
        for model in plan.models:
            lines += _fastest(rows, model)
    steps = [data["steps"].get(step.name, {}) for step in steps_of(plan)]
    bad = [said["title"] for said in steps if said.get("state") in ("failed", "cut", "not begun")]
    return [*lines, f"**Did not come off**: {', '.join(bad)}; the steps below say why."] if bad else lines


def _model(row: Data) -> str:
    return str(row["step"]).partition(":")[2] or str(row["step"])


def _is_right(rows: list[Data]) -> list[str]:
    lines = []
    tests = [row for row in rows if row["table"] == "tests" and "failed" in row["values"]]
    for row in tests:
        failed, passed = row["values"]["failed"], row["values"]["passed"]
        cut = f"; {row['note']}" if row["note"] else ""
        lines.append(f"Tests: {passed} passed, {f'**{failed} failed**' if failed else 'none failed'}{cut}")
    if not tests:
        lines.append("Tests: **no result**, so nothing here is known to be right")
    checks = [row for row in rows if row["table"] == "right"]
    measured = [row for row in checks if row["state"] == "measured"]
    if measured:
        worst = max(row["values"]["worst"] for row in measured)
        lines.append(
            f"Answers of whole models: {len(measured)} checks right, at most {worst:.1g} off (rounding is up to 0.03)"
        )
    wrong = [f"{_model(row)} ({row['name']})" for row in checks if row["state"] in ("failed", "unclean")]
    return [*lines, f"Answers of whole models: **wrong or failed** in {', '.join(wrong)}"] if wrong else lines


def _unclean(rows: list[Data]) -> list[str]:
    unclean = [f"{_model(row)} ({row['name']})" for row in rows if row["state"] == "unclean"]
    if not unclean:
        return []
    return [f"**Not clean, so without times**: {', '.join(unclean)}: the CPU answered where the accelerator failed"]


def _kernels(rows: list[Data]) -> list[str]:
    found = [
        row["values"]["of_copy"]
        for row in rows
        if row["table"] == "kernels" and row["name"].endswith(", 1 token") and row["values"]
    ]
    if not found:
        return []
    return [f"Kernels, one token: {100 * min(found):.0f} to {100 * max(found):.0f} % of a copy's bandwidth"]


def _fastest(rows: list[Data], model: str) -> list[str]:
    """One line with the fastest method of each cache size."""
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["step"] == f"model:{model}" and row["table"] == "methods" and "ms" in row["values"]:
            cache, method = row["name"].split(", ", 1)
            best[cache] = min(best.get(cache, (float("inf"), "")), (row["values"]["ms"], method))
    if not best:
        return [f"{model}: no times"]
    order = sorted(best, key=lambda cache: (cache == "all", cache))
    said = [f"{cache} cached {1e3 / best[cache][0]:.1f} ({best[cache][1]})" for cache in order]
    return [f"{model}, tokens a second of the fastest method: {', '.join(said)}"]
