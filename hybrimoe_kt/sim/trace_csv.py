"""Reader of the route-trace CSV format: `turn,phase,step,layer,slot,expert,weight[,...]`, one row per routed expert."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrimoe_kt.errors import ConfigError

from .trace import ABSENT, Phase, Trace, check, make_steps

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
PHASES: dict[int, Phase] = {0: "prefill", 1: "decode"}


class Row(NamedTuple):
    turn: int
    phase: int
    step: int
    layer: int
    slot: int
    expert: int
    weight: float


@dataclass
class Header:
    """What the `#` lines say; every field is needed before the first row."""

    model: str = ""
    num_experts: int = 0
    top_k: int = 0
    expert_bytes: dict[int, int] = field(default_factory=dict)


Groups = dict[tuple[int, int, int], dict[int, list[tuple[Row, int]]]]
"""(turn, phase, step) -> layer -> its rows with their line numbers; insertion keeps the file's order."""


def read_csv(path: str | Path) -> Trace:
    """Read one CSV trace; each error names file and line."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a trace ({error})") from None
    header, groups = _parse(file, lines)
    layers = tuple(sorted(header.expert_bytes))
    _check_groups(file, groups, layers, header)
    return check(_assemble(file, header, layers, groups), str(file))


def _parse(file: Path, lines: Iterable[str]) -> tuple[Header, Groups]:
    header, groups, named = Header(), Groups(), False
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            _read_comment(file, number, line, header)
        elif not line.strip():
            continue
        elif not named:
            _check_columns(file, number, line, header)
            named = True
        else:
            row = _read_row(file, number, line, header)
            groups.setdefault((row.turn, row.phase, row.step), {}).setdefault(row.layer, []).append((row, number))
    if not groups:
        raise ConfigError(f"{file}:{number or 1}: the trace is empty; expected rows of {','.join(COLUMNS)}")
    return header, groups


def _read_comment(file: Path, number: int, line: str, header: Header) -> None:
    values = dict(re.findall(r"(\w+)=(\S+)", line))
    try:
        if "model" in values:
            header.model = values["model"]
            header.num_experts = int(values["n_expert"])
            header.top_k = int(values["n_expert_used"])
        elif "layer" in values and "expert_bytes" in values:
            header.expert_bytes[int(values["layer"])] = int(values["expert_bytes"])
    except (KeyError, ValueError):
        raise ConfigError(
            f"{file}:{number}: this comment needs whole numbers n_expert and n_expert_used, or layer and expert_bytes"
        ) from None


def _check_columns(file: Path, number: int, line: str, header: Header) -> None:
    columns = tuple(part.strip() for part in line.split(","))
    if columns[: len(COLUMNS)] != COLUMNS:
        raise ConfigError(f"{file}:{number}: wrong header {line.strip()!r}; expected {','.join(COLUMNS)}")
    if header.num_experts < 1 or header.top_k < 1 or not header.expert_bytes:
        raise ConfigError(
            f"{file}:{number}: before the column names there must be a line '# model=... n_expert=..."
            " n_expert_used=...' and a line '# layer=... expert_bytes=...' for each layer"
        )


def _read_row(file: Path, number: int, line: str, header: Header) -> Row:
    parts = line.split(",")
    try:
        turn, phase, step, layer, slot, expert = (int(part) for part in parts[:6])
        row = Row(turn, phase, step, layer, slot, expert, float(parts[6]))
    except (ValueError, IndexError, TypeError):
        raise ConfigError(f"{file}:{number}: {line.strip()!r} is not a row of {','.join(COLUMNS)}") from None
    if row.phase not in PHASES:
        raise ConfigError(f"{file}:{number}: phase {row.phase} is neither 0 (prefill) nor 1 (decode)")
    if row.layer not in header.expert_bytes:
        raise ConfigError(f"{file}:{number}: layer {row.layer} has no '# layer={row.layer} expert_bytes=...' line")
    if not 0 <= row.expert < header.num_experts:
        raise ConfigError(f"{file}:{number}: unknown expert {row.expert}; valid: 0 to {header.num_experts - 1}")
    if not math.isfinite(row.weight):
        raise ConfigError(f"{file}:{number}: weight {parts[6]} of expert {row.expert} is not a finite number")
    return row


def _check_groups(file: Path, groups: Groups, layers: tuple[int, ...], header: Header) -> None:
    last = layers[-1]
    for (turn, phase, step), by_layer in groups.items():
        first_line = next(iter(by_layer.values()))[0][1]
        optional = {last} if phase == 0 else set()
        missing = [layer for layer in layers if layer not in by_layer and layer not in optional]
        if missing:
            raise ConfigError(
                f"{file}:{first_line}: step {step} of turn {turn} lacks layer {missing[0]}; every token needs all"
                f" {len(layers)} layers"
            )
        for layer, rows in by_layer.items():
            line = rows[-1][1]
            if len(rows) != header.top_k:
                raise ConfigError(
                    f"{file}:{line}: step {step}, layer {layer} has {len(rows)} experts; the header's n_expert_used"
                    f" is {header.top_k}"
                )
            if len({row.expert for row, _ in rows}) != len(rows):
                raise ConfigError(f"{file}:{line}: step {step}, layer {layer} names an expert twice")


def _assemble(file: Path, header: Header, layers: tuple[int, ...], groups: Groups) -> Trace:
    shape = (len(groups), len(layers), header.top_k)
    experts = np.full(shape, ABSENT, dtype=np.int16)
    weights = np.zeros(shape, dtype=np.float32)
    position = {layer: i for i, layer in enumerate(layers)}
    requests: list[int] = []
    phases: list[Phase] = []
    counts: list[int] = []
    previous: tuple[int, int] | None = None
    for token, ((turn, phase, _), by_layer) in enumerate(groups.items()):
        # Consecutive prefill tokens of one turn are one step.
        if PHASES[phase] == "prefill" and previous == (turn, phase):
            counts[-1] += 1
        else:
            requests.append(turn)
            phases.append(PHASES[phase])
            counts.append(1)
        previous = (turn, phase)
        for layer, rows in by_layer.items():
            ordered = sorted(row for row, _ in rows)
            experts[token, position[layer]] = [row.expert for row in ordered]
            weights[token, position[layer]] = [row.weight for row in ordered]
    return Trace(
        model=header.model,
        layers=layers,
        num_experts=header.num_experts,
        expert_bytes=tuple(header.expert_bytes[layer] for layer in layers),
        steps=make_steps(requests, phases, counts),
        experts=experts,
        weights=weights,
        source=f"recorded: {file.name}",
    )
