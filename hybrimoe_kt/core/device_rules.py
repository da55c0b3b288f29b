"""What a device decides by itself about one token's layer step: the rules its kernels follow, in whole numbers.

The numbers of experts held, arriving and missing give the plan (`decision_table`); these rules say which experts it
means and which lose their slots. Everything is an integer, so kernels give the same answers bit for bit. A step is
`plan_step`, once a layer, and `look_ahead`, once a layer for each of the later layers that gates were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hybrimoe_kt.errors import ConfigError

from .cache import FREE
from .decision_table import DecisionTable
from .policies.base import check_options, check_range
from .policies.mrs import SCORE_BITS, MrsPolicy

__all__ = ["ALPHA_BITS", "ARRIVING", "BROUGHT", "DEVICE_POLICIES", "HELD", "ON_CPU", "SCORE_BITS", "SHARE_BITS", "Copy",
           "DeviceRules", "Guess", "LayerTables", "Step", "look_ahead", "plan_step", "shares_of"]  # fmt: skip

SHARE_BITS = 24
"""Router's probabilities are whole multiples of 2^-24: what float32 has of numbers from 0.5 to 1."""
ALPHA_BITS = 16
"""The rate of their average is a whole multiple of 2^-16."""
DEVICE_POLICIES = ("mrs", "lru")

HELD, ARRIVING, BROUGHT, ON_CPU = range(4)
"""What becomes of a routed expert: computed at once, when it has landed, once it has been brought, on the CPU."""


@dataclass(frozen=True, slots=True)
class DeviceRules:
    """What the rules are, for all layers alike but for `kept`, which follows a layer's top-k.

    `alpha` is the rate of the MRS average in units of 2^-16, `top_p` the number of probabilities kept, as a multiple of
    top-k, as in `MrsPolicy`. At most `prefetch_size` transfers start ahead of need in a layer. With `bypass` a missing
    expert that is worth less than the expert it would evict is not brought, and is the CPU's.
    """

    policy: str = "mrs"
    alpha: int = 1966
    top_p: float = 2.0
    prefetch_size: int = 1
    admission: bool = True
    bypass: bool = False

    def __post_init__(self) -> None:
        if self.policy not in DEVICE_POLICIES:
            raise ConfigError(
                f"planner device keeps experts by {' or '.join(DEVICE_POLICIES)}, not by {self.policy!r}; give "
                f"--policy mrs, or leave it out"
            )
        check_range("planner device", "alpha", self.alpha, 1, 1 << ALPHA_BITS)

    @classmethod
    def of(
        cls, policy: str, options: Mapping[str, Any], *, prefetch_size: int, admission: bool, bypass: bool = False
    ) -> DeviceRules:
        """The rules that come nearest to a host's policy of that name and options."""
        if policy != "mrs":
            return cls(policy, prefetch_size=prefetch_size, admission=admission, bypass=bypass)
        option = check_options("policy mrs", options, MrsPolicy.options)
        alpha = max(1, min(1 << ALPHA_BITS, round(option["alpha"] * (1 << ALPHA_BITS))))
        return cls(policy, alpha, option["top_p"], prefetch_size, admission, bypass)

    def kept(self, num_experts: int, top_k: int) -> int:
        """How many of a step's probabilities enter the averages; 0 for LRU."""
        return max(1, min(num_experts, round(self.top_p * top_k))) if self.policy == "mrs" else 0


@dataclass(slots=True)
class LayerTables:
    """One layer's state, as it stands on the device; `num_slots` slots, which are as many as `expert_of` has.

    `slot_of [num_experts]` and `expert_of [num_slots]` are inverse to each other, FREE where there is none. `scores
    [num_experts]` are what experts are worth. A slot's expert is arriving while `issued > landed`: `issued [num_slots]`
    is the number of the last copy that was ordered into it, written by whoever orders, `landed [num_slots]` that of the
    last that is through, written by whoever copies. `clock` counts routed experts, `num_copies` copies ordered.
    """

    slot_of: list[int]
    expert_of: list[int]
    scores: list[int]
    issued: list[int] = field(default_factory=list)
    landed: list[int] = field(default_factory=list)
    clock: int = 0
    num_copies: int = 0

    @classmethod
    def empty(cls, num_experts: int, num_slots: int) -> LayerTables:
        """All slots free, every score 0."""
        no_copy = [0] * num_slots
        return cls([FREE] * num_experts, [FREE] * num_slots, [0] * num_experts, no_copy, no_copy.copy())

    def is_arriving(self, slot: int) -> bool:
        """Whether a copy into `slot` has been ordered and is not through."""
        return self.issued[slot] > self.landed[slot]

    def order(self, expert: int, slot: int) -> Copy:
        """Give `slot` to `expert`, whose copy is to come."""
        old = self.expert_of[slot]
        if old != FREE:
            self.slot_of[old] = FREE
        self.slot_of[expert], self.expert_of[slot] = slot, expert
        self.num_copies += 1
        self.issued[slot] = self.num_copies
        return Copy(expert, slot, old, self.num_copies)

    def land(self, copy: Copy) -> None:
        """The copy is through."""
        self.landed[copy.slot] = copy.number

    def check(self) -> None:
        """Assert that the two tables are inverse, and that no copy is through that was not ordered."""
        for slot, expert in enumerate(self.expert_of):
            assert expert == FREE or self.slot_of[expert] == slot, f"slot {slot} and expert {expert} disagree"
        held = [slot for slot in self.slot_of if slot != FREE]
        assert len(held) == len(set(held)) == sum(expert != FREE for expert in self.expert_of), "a slot is named twice"
        assert all(issued >= landed for issued, landed in zip(self.issued, self.landed, strict=True)), "landed too soon"
        assert max(self.issued, default=0) <= self.num_copies, "a copy has a number that was not given"


class Copy(NamedTuple):
    """One expert's way into a slot; `evicted` is whom it takes the place of, FREE for nobody."""

    expert: int
    slot: int
    evicted: int
    number: int


class Step(NamedTuple):
    """A layer step that was planned, by place in the router's list `[top_k]`.

    `doing` says what becomes of each expert, `slots` where it is computed, FREE for the CPU's. `copies` are in link
    order. `entry` is the place of what was followed in the decision table, `room` what that says of the link.
    """

    ids: tuple[int, ...]
    doing: tuple[int, ...]
    slots: tuple[int, ...]
    copies: tuple[Copy, ...]
    entry: int
    room: int


class Guess(NamedTuple):
    """A later layer and the experts that its gate would choose, the most probable first."""

    layer: LayerTables
    table: DecisionTable
    gains_ns: Sequence[int]
    ids: Sequence[int]


def shares_of(probabilities: Sequence[float]) -> list[int]:
    """Float32 numbers from 0 to 1 as multiples of 2^-24, rounded down, exact on every device; no numbers are 0."""
    return [int(min(value, 1.0) * (1 << SHARE_BITS)) if value > 0.0 else 0 for value in probabilities]


def touch(layer: LayerTables, rules: DeviceRules, kept: int, ids: Sequence[int], shares: Sequence[int]) -> None:
    """Let the scores learn from a step.

    MRS: the average of the `kept` highest of `shares [num_experts]`, all that are as high as the lowest of these; the
    others fade. LRU: a stamp, highest for the expert that the router named first.
    """
    layer.clock += len(ids)
    if rules.policy == "lru":
        for place, expert in enumerate(ids):
            layer.scores[expert] = layer.clock - place
        return
    cut = sorted(shares, reverse=True)[kept - 1]
    for expert, share in enumerate(shares):
        layer.scores[expert] = faded(layer.scores[expert], share if share >= cut else 0, rules.alpha)


def faded(score: int, share: int, alpha: int) -> int:
    """One step of an average; products stay below 2^47."""
    return score - ((score * alpha) >> ALPHA_BITS) + ((share * alpha) >> (ALPHA_BITS + SHARE_BITS - SCORE_BITS))


def plan_step(
    layer: LayerTables, rules: DeviceRules, table: DecisionTable, ids: Sequence[int], shares: Sequence[int]
) -> Step:
    """Decide one token's step and change the layer accordingly; `ids` in the router's order, all different.

    Brought are the missing of highest score; left to the CPU the held of lowest score, of equals those named later, and
    the arriving that land last. Who leaves: free slots first, then the lowest scores outside `ids`, of equals the
    lowest slot; nobody whose copy is under way. Where no more may leave, the rest is the CPU's.
    """
    kept = rules.kept(len(layer.slot_of), table.top_k)
    touch(layer, rules, kept, ids, shares)
    places = range(len(ids))
    slots = [layer.slot_of[expert] for expert in ids]
    missing = [place for place in places if slots[place] == FREE]
    arriving = [place for place in places if slots[place] != FREE and layer.is_arriving(slots[place])]
    held = [place for place in places if slots[place] != FREE and place not in arriving]
    index = table.index(len(held), len(arriving), len(missing))
    decision = table.decision(len(held), len(arriving), len(missing))
    scores = [layer.scores[expert] for expert in ids]
    doing = [ON_CPU] * len(ids)
    held.sort(key=lambda place: (scores[place], -place))
    for place in held[decision.left :]:
        doing[place] = HELD
    arriving.sort(key=lambda place: layer.issued[slots[place]])
    for place in arriving[: len(arriving) - decision.given_up]:
        doing[place] = ARRIVING
    missing.sort(key=lambda place: (-scores[place], place))
    victims = _victims(layer, ids)[: decision.transfers]
    copies = []
    for place, slot in zip(missing, victims, strict=False):
        old = layer.expert_of[slot]
        if rules.bypass and old != FREE and scores[place] < layer.scores[old]:
            break
        copies.append(layer.order(ids[place], slot))
        doing[place], slots[place] = BROUGHT, slot
    used = tuple(slot if what != ON_CPU else FREE for slot, what in zip(slots, doing, strict=True))
    return Step(tuple(ids), tuple(doing), used, tuple(copies), index, decision.room)


def look_ahead(
    this: LayerTables, step: Step, later: Sequence[Guess], rules: DeviceRules
) -> tuple[list[tuple[int, Copy]], list[Copy]]:
    """Order up to `prefetch_size` copies while `step` of the layer `this` runs; `later` are guesses, nearest first.

    Returns those into later layers, each with its layer's place in `later`, and those into `this`.

    Later layers: of the experts guessed and missing, the most probable first, one more for as long as that shortens the
    layer's step as predicted; beyond the next layer only what the link brings before the next layer begins. Nobody
    guessed loses a slot, and nobody whose copy is under way. Then admission, see `_admit`.
    """
    copies: list[tuple[int, Copy]] = []
    for ahead, guess in enumerate(later):
        most = rules.prefetch_size if ahead == 0 else min(rules.prefetch_size, step.room)
        copies += [(ahead, copy) for copy in _prefetch(guess, most - len(copies))]
    if not rules.admission:
        return copies, []
    return copies, _admit(this, step, min(rules.prefetch_size, step.room) - len(copies))


def _prefetch(guess: Guess, most: int) -> list[Copy]:
    layer, table, gains_ns, ids = guess
    slots = [layer.slot_of[expert] for expert in ids]
    missing = [expert for expert, slot in zip(ids, slots, strict=True) if slot == FREE]
    num_arriving = sum(slot != FREE and layer.is_arriving(slot) for slot in slots)
    num_held = len(ids) - len(missing) - num_arriving
    copies: list[Copy] = []
    for number, (expert, slot) in enumerate(zip(missing, _victims(layer, ids), strict=False)):
        gain_ns = gains_ns[table.index(num_held + number, num_arriving, len(missing) - number)]
        if number >= most or gain_ns <= 0:
            break
        copies.append(layer.order(expert, slot))
    return copies


def _admit(layer: LayerTables, step: Step, most: int) -> list[Copy]:
    """Order up to `most` copies of what the CPU computes in a step and has no slot, for later tokens.

    The highest score first, of equals the lowest number; each only past an expert outside the step that is worth less.
    """
    absent = [e for e, what in zip(step.ids, step.doing, strict=True) if what == ON_CPU and layer.slot_of[e] == FREE]
    absent.sort(key=lambda expert: (-layer.scores[expert], expert))
    copies: list[Copy] = []
    for number, (expert, slot) in enumerate(zip(absent, _victims(layer, step.ids), strict=False)):
        old = layer.expert_of[slot]
        if number >= most or (old != FREE and layer.scores[expert] <= layer.scores[old]):
            break
        copies.append(layer.order(expert, slot))
    return copies


def _victims(layer: LayerTables, kept: Sequence[int]) -> list[int]:
    """Slots that may be given away, the first to go first."""
    stay = set(kept)
    free = [slot for slot, expert in enumerate(layer.expert_of) if expert not in stay and not layer.is_arriving(slot)]
    worth = [layer.scores[expert] if expert != FREE else FREE for expert in layer.expert_of]
    return sorted(free, key=lambda slot: (worth[slot], slot))
