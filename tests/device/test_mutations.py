"""Every wait, mark and pin of the device layer is needed: without any one of them something is noticed.

Leaving one out is what deleting its line would do. Noticed means a race is reported, an answer is wrong, or an
internal check fails.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import hybrimoe_kt.device
from hybrimoe_kt.core.cache import ExpertCache
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.errors import KernelError

from .machine import make
from .test_adversarial import SCENARIOS

SITES: dict[str, str] = {
    # marks
    "arrival": "decode",
    "readers": "pressure",
    "routing read": "decode",
    "guesses read": "decode",
    "result": "decode",
    "on-demand copied": "pressure",
    "prefetch copied": "aborts",
    "last use of fresh memory": "decode",
    "copied into the stream buffer": "wrongly streamed",
    # waits of one stream for another
    "arrival before use": "decode",
    "readers before overwrite": "pressure",
    "earlier copy before overwrite": "aborts",
    "another layer's copy before overwrite": "wrongly streamed",
    "fresh memory before landing": "decode",
    # waits of the host
    "host: routing read": "decode",
    "host: guesses read": "decode",
    "host: result": "decode",
    "host: on-demand copied": "pressure",
    "host: prefetch copied": "aborts",
    "host: CPU experts": "decode",
}
"""What is left out -> the scenario that shows it."""
SEEDS = 60


def notice(seed: int, scenario: str, ignore: str | None = None) -> tuple[str | None, int]:
    """Play a scenario without one site; return what gave it away, and how often it was left out."""
    options = {key: value for key, value in SCENARIOS[scenario].items() if key != "tokens"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "note_failure", lambda lane: False)  # however often
        machine = None
        try:
            machine = make(patch, seed, ignore=ignore, **options)
            machine.play(*SCENARIOS[scenario]["tokens"])
        except (AssertionError, RuntimeError, IndexError, KernelError) as error:
            return f"{type(error).__name__}: {error}", 1
        found = machine.races or (["an accelerator failed"] if machine.num_failures else [])
        return (found[0] if found else None), machine.accelerators[0].adversary.ignored


@pytest.mark.parametrize("site", SITES)
def test_leaving_it_out_is_noticed(site: str) -> None:
    left_out = 0
    for seed in range(SEEDS):
        found, ignored = notice(seed, SITES[site], site)
        left_out += ignored
        if found is not None:
            return
    pytest.fail(f"{site!r} was left out {left_out} times and nobody noticed")


def test_leaving_out_pins_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefetch for the very layer whose plan is open may then take a slot that the plan computes with."""

    def evictable(self: ExpertCache, protected: Any) -> list[int]:
        return [e for e in self.occupant if e >= 0 and e not in protected and e not in self.arrival_s]

    monkeypatch.setattr(ExpertCache, "evictable", evictable)
    found = [notice(seed, "aborts")[0] for seed in range(SEEDS)]
    assert any(reason and "overwrites what its plan pinned" in reason for reason in found), found


def test_the_list_is_complete() -> None:
    """Every site that the device layer names is left out by a test above."""
    named: set[str] = set()
    recorded: set[str] = set()
    files = set(Path(hybrimoe_kt.device.__file__).parent.glob("*.py"))
    for file in sorted(file for file in files if file.name != "measure.py"):  # that one only takes times
        for call in ast.walk(ast.parse(file.read_text())):
            if not isinstance(call, ast.Call):
                continue
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if called == "record":
                recorded.update(set(texts) - {"drained"})  # after failures only, see test_faults.py
            elif called == "_channel":
                recorded.add(texts[1])
            elif called == "wait" and "deadline" not in ast.unparse(call.func):
                named.update(texts)
    assert named and recorded
    waited_by_host = {site.removeprefix("host: ") for site in SITES if site.startswith("host: ")} - {"CPU experts"}
    assert named | recorded == {site for site in SITES if not site.startswith("host: ")}
    assert waited_by_host == recorded - {
        "arrival",
        "readers",
        "copied into the stream buffer",
        "last use of fresh memory",
    }, "which the host waits for only while recovering"
