"""Shares asked for and answered by real threads, under faults; and mistakes that the same play finds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hybrimoe_kt.device.shares.service import ShareService
from tests.device.shares.emulation import FAULTS, DisturbedPosts, Fault, Mutation, Outcome, play, quick_switches

QUICK, ALL = 8, 1000
MUTANT_SEEDS = 400


def total(outcomes: list[Outcome]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        names = ("num_tokens", "num_asked", "num_failed", "num_dead", "struck")
        counts.update({name: int(getattr(outcome, name)) for name in names})
    return counts


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault or "none")
def test_no_wrong_answer_is_taken_and_nothing_hangs(fault: Fault) -> None:
    with quick_switches():
        outcomes = [play(seed, fault=fault) for seed in range(QUICK)]
    for outcome in outcomes:
        assert outcome.is_right, outcome
    counts = total(outcomes)
    assert counts["num_asked"] > 2 * QUICK, "the device asked"
    assert bool(counts["struck"]) == bool(fault), "faults struck"
    assert counts["num_failed"] >= counts["struck"]
    assert bool(counts["num_dead"]) or fault != "hang"


@pytest.mark.slow
def test_a_thousand_seeds() -> None:
    with quick_switches():
        outcomes = [play(seed) for seed in range(ALL)]
    assert [outcome for outcome in outcomes if not outcome.is_right] == []
    counts = total(outcomes)
    assert counts["struck"] > ALL / 2 and counts["num_asked"] > 8 * ALL and counts["num_dead"] > 50
    assert sum(outcome.num_late for outcome in outcomes) < ALL / 10


class _DoneFirst(DisturbedPosts):
    def answer(self, place: int, answer: torch.Tensor | None) -> None:
        self.clear_asked(place)
        self.set_done(place)
        self.write_outbox(answer)


class _AskedStays(DisturbedPosts):
    def clear_asked(self, place: int) -> None:
        self.disturb()


class _NoEpoch(ShareService):
    def _is_current(self, number: int) -> bool:
        return True


class _AskedFirst(DisturbedPosts):
    """Of the device: it asks before all of the inbox is there."""

    def write_inbox(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self._late = lambda: super(_AskedFirst, self).write_inbox(hidden, ids, weights)

    def set_asked(self, place: int) -> None:
        super().set_asked(place)
        self._late()


class _DoneStays(DisturbedPosts):
    """Of the device: it does not take the last token's word back."""

    def clear_done(self, place: int) -> None:
        self.disturb()


class _Silent(ShareService):
    """Keeps to itself what the backend raised."""

    def _as_ours(self, error: BaseException) -> None:  # type: ignore[override]
        return None


class _Patient(ShareService):
    """Does not ask whether a wait ended itself."""

    def close_step(self) -> None:
        self.posts._timed_out[0] = 0
        with self._changed:
            while self._busy_since is not None or self.posts.next_asked() >= 0:
                self._changed.wait(1e-3)
        super().close_step()


MUTANTS: dict[str, tuple[Mutation, Fault, str]] = {
    "done before the answer is written": (Mutation(posts=_DoneFirst), "", "wrong"),
    "asked is not cleared": (Mutation(posts=_AskedStays, hang_s=0.5), "", "hangs"),
    "the outbox is read before done": (Mutation(is_hasty=True), "", "wrong"),
    "release without a number": (Mutation(service=_NoEpoch), "hang", "wrong"),
    "asked before the inbox is written": (Mutation(posts=_AskedFirst), "", "wrong"),
    "done is not cleared": (Mutation(posts=_DoneStays), "", "complaints"),
    "a wait that ended itself is not noticed": (Mutation(service=_Patient), "bound", "wrong"),
    "a failure is kept secret": (Mutation(service=_Silent), "raise", "wrong"),
}
"""What is changed, under which fault it shows, and as what."""


RARE = "release without a number"
"""Of some dozens of seeds one shows it."""


@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=pytest.mark.slow if name == RARE else ()) for name in MUTANTS]
)
def test_a_mistake_in_the_protocol_is_found(mutant: str) -> None:
    mutation, fault, kind = MUTANTS[mutant]
    with quick_switches():
        for seed in range(MUTANT_SEEDS):
            outcome = play(seed, mutation, fault)
            if getattr(outcome, kind):
                return
    pytest.fail(f"{MUTANT_SEEDS} seeds do not find it")
