"""What must be true of every timeline, checked on the file that a user would open."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

ROUNDING_US = 0.002
Event = dict[str, Any]


def read(file: Path) -> tuple[dict[str, list[Event]], dict[str, Any]]:
    """Check the format; return lane -> its events in order of time, and `otherData`."""
    data = json.loads(file.read_text(encoding="utf-8"))
    names: dict[int, str] = {}
    lanes: dict[str, list[Event]] = {}
    for event in data["traceEvents"]:
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
            continue
        assert event["ph"] == "X"
        assert isinstance(event["name"], str) and event["name"]
        assert isinstance(event["ts"], float) and isinstance(event["dur"], float)
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert event["pid"] == 1
        lanes.setdefault(names[event["tid"]], []).append(event)
    for events in lanes.values():
        events.sort(key=lambda event: (event["ts"], event["dur"]))
    return lanes, data["otherData"]


def check(file: Path, lanes_expected: set[str], clocks_us: float = ROUNDING_US) -> dict[str, list[Event]]:
    """Check that the timeline tells the truth about its own plans; returns its lanes.

    `clocks_us` is how far two clocks may be apart: plans are on the host's, work may be on a device's.
    """
    lanes, other = read(file)
    assert set(lanes) == lanes_expected
    assert other["origin"] and other["model"]
    for name, events in lanes.items():
        for one, next_one in pairwise(events):
            assert next_one["ts"] >= one["ts"] + one["dur"] - ROUNDING_US, f"{name}: {one} overlaps {next_one}"
    plans = {event["args"]["plan"]: event for event in lanes["scheduler"] if event["args"]["work"] == "plan"}
    assert sorted(plans) == list(range(1, len(plans) + 1))
    gpu = [event for name, events in lanes.items() if name.startswith("GPU") for event in events]
    link = [event for name, events in lanes.items() if name.startswith("link") for event in events]
    _each_expert_where_planned(plans, [e for e in gpu if e["args"]["work"] == "experts"], lanes.get("CPU", []))
    _each_transfer_once(plans, link)
    arrivals_before_use([e for e in gpu if e["args"]["work"] == "experts"], link, clocks_us)
    for event in [*gpu, *lanes.get("CPU", []), *link]:
        if "plan" in event["args"]:
            plan = plans[event["args"]["plan"]]
            assert event["ts"] >= plan["ts"] - clocks_us, f"{event} began before {plan}"
    return lanes


def _each_expert_where_planned(plans: dict[int, Event], gpu: list[Event], cpu: list[Event]) -> None:
    for lane, events in (("gpu", gpu), ("cpu", cpu)):
        done: dict[int, list[int]] = {number: [] for number in plans}
        for event in events:
            if event["args"]["work"] == "experts":
                done[event["args"]["plan"]] += event["args"]["experts"]
                assert event["args"]["layer"] == plans[event["args"]["plan"]]["args"]["layer"]
        for number, plan in plans.items():
            assert sorted(done[number]) == sorted(plan["args"][lane]), f"{lane}, plan {number}"


def _each_transfer_once(plans: dict[int, Event], link: list[Event]) -> None:
    arrived = Counter(
        (event["args"]["plan"], event["args"]["experts"][0])
        for event in link
        if event["args"]["work"] == "on_demand" and event["args"].get("piece") == event["args"].get("pieces")
    )
    planned = Counter((number, expert) for number, plan in plans.items() for expert in plan["args"]["transfers"])
    assert arrived == planned


def arrivals_before_use(gpu: list[Event], link: list[Event], clocks_us: float) -> None:
    """Check that no expert was used before its last transfer had ended.

    A device's two times are compared, but its clock may have been tied to the host's anew between them.
    """
    uses = 0
    for event in gpu:
        layer, number = event["args"]["layer"], event["args"]["plan"]
        for expert in event["args"]["experts"]:
            brought = [
                copy
                for copy in link
                if (copy["args"]["layer"], copy["args"]["experts"]) == (layer, [expert])
                and copy["args"]["plan"] <= number
            ]
            last = max(brought, key=lambda copy: (copy["args"]["plan"], copy["ts"]), default=None)
            if last is not None:
                uses += 1
                assert last["ts"] + last["dur"] <= event["ts"] + clocks_us, f"{event} used before {last}"
    assert uses or not link, "what was transferred is used at least once"
