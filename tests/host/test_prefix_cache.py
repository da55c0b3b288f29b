"""Conversations that are kept: found by their beginning, copied or gone on from, moved to the host, and forgotten."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_kt.engine.chat.turns import NO_TURNS, Turns
from hybrimoe_kt.engine.memory.conversation import Conversation, common_length
from hybrimoe_kt.engine.memory.prefix_cache import PrefixCache
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from tests.host.test_equality import SHAPES
from tests.support.generated_model import GeneratedModel, Shape

Make = Callable[[Shape], GeneratedModel]
PLACES: dict[str, dict[str, Any]] = {
    "graphs": {"device": "cpu", "accelerator": "none", "cpu_backend": "ggml"},
    "modules": {"device": "emulated:0", "accelerator": "emulated", "cache_size": 0.5, "cpu_backend": "torch_reference"},
    "captured": {
        "device": "emulated:0", "accelerator": "emulated", "cache_size": 0.5, "cpu_backend": "torch_reference",
        "captures": True,
    },
}  # fmt: skip
RAM = 2**30


def generator(
    model: GeneratedModel, place: str, *, parallel: int = 1, cache_ram: int = RAM, **options: Any
) -> TokenGenerator:
    given = PLACES[place] | options
    own = {name: given.pop(name) for name in ("device", "kv_cache_type") if name in given}
    captures = given.pop("captures", False)
    loaded = load_model(model.path, option_overrides=given, progress=False, **own)
    return TokenGenerator(loaded, set(), captures=captures, parallel=parallel, cache_ram=cache_ram)


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(250), k=length)


def answer(made: TokenGenerator, prompt: list[int], num_tokens: int, turns: Turns = NO_TURNS) -> list[int]:
    generation = made.begin(prompt, Sampling(max_new_tokens=num_tokens, temperature=0), turns=turns)
    while not generation.is_over:
        made.step()
    assert generation.error is None
    return generation.ids[len(prompt) :]


class Agent:
    """A conversation that grows: every turn sends all of it again, its thoughts left out."""

    def __init__(self, number: int, system: list[int], begins: list[int], thoughts: int) -> None:
        self._draw, self._begins, self._thoughts = random.Random(number), begins, thoughts
        self.said, self._lead = list(system), len(system)
        self._known = 0
        self.num_new = self.num_computed = 0

    def turn(self, made: TokenGenerator, alone: TokenGenerator, size: int) -> None:
        """Ask for one answer more, and hold it against one of nobody who remembers anything."""
        self.said += self._draw.choices(range(250), k=size)
        prompt = self.said + self._begins
        found = answer(made, prompt, 6, Turns(self._lead, len(self.said)))
        run = made.last_run()
        self.num_computed += run["prompt_tokens"] - run["reused_tokens"]
        self.num_new += len(prompt) - self._known
        alone.reset()
        assert found == answer(alone, prompt, 6)
        self._known = len(self.said)
        self.said += self._begins[:1] + found[self._thoughts :]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["qwen3moe", "deepseek3", "qwen3next"])
def test_no_agent_is_read_twice(generated: Make, name: str, place: str) -> None:
    """Four of them in turn, whose thoughts are dropped from one turn to the next."""
    model = generated(SHAPES[name])
    made, alone = generator(model, place), generator(model, place, cache_ram=0)
    system = text(0, 30)
    agents = [Agent(number, system, [7, 9], thoughts=2) for number in range(1, 5)]
    for at in range(16):
        agents[at % 4].turn(made, alone, 12)
    new, computed = (sum(getattr(agent, each) for agent in agents) for each in ("num_new", "num_computed"))
    assert computed <= new - 3 * len(system) + 16 * 2
    assert (made.kept.num_hits, made.kept.num_misses) == (15, 1)
    if place == "captured":
        assert isinstance(made.loop, CapturedLoop)
        assert 0 < made.loop.num_captures <= 6, "conversations take turns in one memory"


@pytest.mark.parametrize("place", PLACES)
def test_a_system_message_is_read_once_however_long_its_conversations_become(generated: Make, place: str) -> None:
    """Its states stay while those of earlier turns are forgotten, also where they were moved to the host."""
    model = generated(SHAPES["qwen3next"])
    made, alone = generator(model, place), generator(model, place, cache_ram=0)
    system = text(0, 30)
    first = Agent(1, system, [7, 9], thoughts=2)
    for _ in range(7):
        first.turn(made, alone, 5)
    (kept,) = made.kept._kept.values()
    assert isinstance(kept, Conversation) and len(kept._marks) == 4 and len(system) in kept._marks
    for number in range(2, 5):
        other = Agent(number, system, [7, 9], thoughts=2)
        other.turn(made, alone, 5)
        assert made.last_run()["reused_tokens"] == len(system)
    stranger = Agent(9, text(5, 30), [7, 9], thoughts=2)
    stranger.turn(made, alone, 5)
    assert made.last_run()["reused_tokens"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 4])
def test_forty_turns_of_four_agents(generated: Make, parallel: int) -> None:
    """Prompts of 2,000 to 6,000 tokens."""
    model = generated(dataclasses.replace(SHAPES["qwen3moe"], context=8192))
    made = generator(model, "graphs", parallel=parallel)
    system = text(0, 1600)
    said = [[*system, *text(number, 400)] for number in range(1, 5)]
    new = [len(each) for each in said]
    computed, longest = 0, 0
    for turn in range(10):
        begun = [
            made.begin([*each, 7, 9], Sampling(max_new_tokens=20, temperature=0), turns=Turns(answer=len(each)))
            for each in said
        ]
        while not all(each.is_over for each in begun):
            made.step()
        for number, generation in enumerate(begun):
            longest = max(longest, len(generation.prompt))
            computed += generation.run.prompt_tokens - generation.run.reused_tokens
            more = [7, *generation.ids[len(generation.prompt) :], *text(100 * turn + number, 380)]
            said[number] += more
            new[number] += len(more) if turn < 9 else 0
    assert 5_500 < longest < 6_500
    total = sum(new) - 3 * len(system)
    print(f"{computed} tokens computed, {total} new")
    assert computed <= 1.1 * total


def test_the_least_used_go_first_and_the_latest_stays(generated: Make) -> None:
    made = generator(generated(SHAPES["qwen3moe"]), "graphs")
    prompts = [text(seed, 20) for seed in range(6)]
    answer(made, prompts[0], 2)
    each = made.kept.num_bytes
    made.kept.budget_bytes = 3 * each
    for prompt in prompts[1:]:
        answer(made, prompt, 2)
        assert made.kept.num_bytes <= 3 * each
    answer(made, prompts[3], 2)
    assert made.last_run()["reused_tokens"] == 19
    answer(made, text(9, 20), 2)
    for prompt, reused in ((prompts[3], 19), (prompts[0], 0)):
        answer(made, prompt, 2)
        assert made.last_run()["reused_tokens"] == reused
    made.kept.budget_bytes = 0
    answer(made, prompts[5], 2)
    assert len(made.kept) == 1
    made.reset()
    assert len(made.kept) == made.kept.num_bytes == 0


def test_a_conversation_that_goes_on_is_not_copied(generated: Make) -> None:
    """One that branches off is: the other's next turn finds its own."""
    made = generator(generated(SHAPES["qwen3moe"]), "graphs")
    prompt = text(1, 60)
    said = answer(made, prompt, 4)
    (first,) = made.kept._kept.values()
    longer = [*prompt, *said, *text(2, 9)]
    answer(made, longer, 4)
    assert list(made.kept._kept.values()) == [first]
    answer(made, [*prompt[:30], *text(3, 9)], 4)
    assert made.last_run()["reused_tokens"] == 30
    assert len(made.kept) == 2
    answer(made, [*longer, 5], 4)
    assert made.last_run()["reused_tokens"] >= len(longer)


def test_one_that_is_being_answered_lends_its_beginning(generated: Make) -> None:
    made = generator(generated(SHAPES["qwen3moe"]), "graphs", parallel=3)
    prompt = text(1, 60)
    begun = [made.begin([*prompt, seed], Sampling(max_new_tokens=5, temperature=0)) for seed in range(3)]
    while not all(one.is_over for one in begun):
        made.step()
    assert [one.run.reused_tokens for one in begun] == [0, 60, 60]
    alone = generator(generated(SHAPES["qwen3moe"]), "graphs", cache_ram=0)
    for one in begun:
        alone.reset()
        assert answer(alone, one.prompt, 5) == one.ids[61:]


@pytest.mark.parametrize("kept", ["q8_0", "f16"])
def test_rounded_keys_are_copied_as_they_are(generated: Make, kept: str) -> None:
    for place in ("graphs", "modules"):
        made = generator(generated(SHAPES["qwen3moe"]), place, kv_cache_type=kept)
        prompt = text(1, 60)
        wanted = answer(made, [*prompt, 3, 4], 5)
        made.reset()
        answer(made, [*prompt, *text(2, 40)], 5)
        assert answer(made, [*prompt, 3, 4], 5) == wanted
        assert made.last_run()["reused_tokens"] == 60 and len(made.kept) == 2


@pytest.mark.parametrize("place", ["modules", "captured"])
@pytest.mark.parametrize("name", ["qwen3moe", "qwen3next"])
def test_kept_ones_leave_accelerators_the_memory_that_is_needed(generated: Make, name: str, place: str) -> None:
    """A room is for 256 tokens more than are held: there is memory for three, and six take turns."""
    model = generated(SHAPES[name])
    made, alone = generator(model, place, parallel=6), generator(model, place, cache_ram=0)
    made.batch.most_tokens, made.kept._moves_to_host = 1000, True
    agents = [Agent(number, text(number, 40), [7, 9], thoughts=2) for number in range(6)]
    for at in range(18):
        agents[at % 6].turn(made, alone, 12)
        kept = made.kept
        live = [each.cache for each in kept._kept.values() if isinstance(each, Conversation)]
        assert sum(cache.room for cache in (*live, *kept._free)) <= 1000
        assert len(kept) == min(6, at + 1)
        assert live, "as many as there is memory for"
    new, computed = (sum(getattr(agent, each) for agent in agents) for each in ("num_new", "num_computed"))
    assert computed <= new + 18 * 2


@pytest.mark.parametrize("place", ["modules", "captured"])
def test_rows_are_as_long_as_the_longest(generated: Make, place: str) -> None:
    """So one long conversation and three short ones need memory for four long ones, or wait for one another."""
    model = generated(SHAPES["qwen3moe"])
    made, alone = generator(model, place, parallel=4), generator(model, place, cache_ram=0)
    made.batch.most_tokens = 200
    prompts = [text(0, 90), text(1, 10), text(2, 10), text(3, 10)]
    begun = [made.begin(prompt, Sampling(max_new_tokens=6, temperature=0)) for prompt in prompts]
    beside: set[int] = set()
    while not all(one.is_over for one in begun):
        made.step()
        lengths = [len(one.ids) for one in made.batch._running]
        assert len(lengths) * max(lengths, default=0) <= 200
        beside.add(len(lengths) if begun[0] in made.batch._running else -len(lengths))
    assert max(beside) == 2 and min(beside) == -3, "the three after the one"
    for one in begun:
        alone.reset()
        assert answer(alone, one.prompt, 6) == one.ids[len(one.prompt) :]


def test_what_cannot_be_copied_is_read_again(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory for the copy: nobody else's answer ends, and nothing is lost track of."""
    made = generator(generated(SHAPES["qwen3moe"]), "captured", parallel=3)
    alone = generator(generated(SHAPES["qwen3moe"]), "captured", cache_ram=0)
    prompt = text(1, 60)
    answer(made, prompt, 3)
    beside = made.begin(text(2, 20), Sampling(max_new_tokens=40, temperature=0))
    while beside.run.new_tokens < 3:
        made.step()

    def full(self: Conversation, *given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    with monkeypatch.context() as patched:
        patched.setattr(Conversation, "fill", full)
        branched = [*prompt[:30], *text(3, 9)]
        assert answer(made, branched, 3) == answer(alone, branched, 3)
    assert beside.error is None
    while not beside.is_over:
        made.step()
    assert not made.kept._in_use
    alone.reset()
    assert answer(alone, beside.prompt, 40) == beside.ids[20:]


def test_what_is_forgotten_to_make_room_is_read_again() -> None:
    """A conversation of states that nobody can copy, found, and in the way of the one that would go on from it."""
    kept = PrefixCache(_Nothing, 10**6, most_live=3, moves_to_host=True)  # type: ignore[arg-type]
    kept.most_live_tokens = 12
    first = kept.take([1, 2, 3])
    first.ids, first.num_before = [1, 2, 3], 3
    first.states = lambda length: None  # type: ignore[method-assign]
    kept.put(first)
    taken = kept.take([1, 2, 9, 9], 4)
    assert taken.ids == [] and len(kept) == 0 and list(kept._in_use.values()) == [taken]


def test_memory_that_is_handed_on_counts() -> None:
    """A short conversation that takes a long one's, beside another that is kept."""
    kept = PrefixCache(_Nothing, 10**6, most_live=3, moves_to_host=True)  # type: ignore[arg-type]
    kept.most_live_tokens = 15
    (first, second) = (kept.take([number, number]) for number in range(2))
    first.ids, second.ids = [0, 0], [1, 1]
    kept.put(first)
    kept.release(second)
    kept.take([5, 5], 2)
    assert kept._room(2, beside=False) <= 15


@pytest.mark.parametrize(("kept_as", "needed"), [("f16", 3000), ("q8_0", 1020)])
def test_only_rows_count_as_the_longest(generated: Make, kept_as: str, needed: int) -> None:
    made = generator(generated(SHAPES["qwen3moe"]), "modules", kv_cache_type=kept_as)
    assert made.steps.memory_tokens([1000, 10, 10]) == needed
    assert generator(generated(SHAPES["qwen3moe"]), "graphs").steps.memory_tokens([1000, 10, 10]) == 1020


class Fake(Conversation):
    """One without layers."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(_Nothing())  # type: ignore[arg-type]
        self.ids = list(ids)


class _Nothing:
    """A cache of no layers, which can go back."""

    layers: tuple[Any, ...] = ()
    is_croppable = True
    usual_room = 10

    def crop(self, _: int) -> None: ...

    def forget(self) -> None: ...


IDS = st.lists(st.integers(0, 2), max_size=6)


@given(IDS, IDS)
def test_common_lengths(first: list[int], second: list[int]) -> None:
    wanted = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        wanted += 1
    assert common_length(first, second) == wanted


@given(
    st.lists(st.tuples(IDS.filter(bool), st.booleans()), max_size=12),
    st.booleans(),
    st.sampled_from([0, 10**6]),
    st.sampled_from([None, 0, 20, 25]),
)
def test_the_longest_beginning_is_found(
    steps: list[tuple[list[int], bool]], moves: bool, budget: int, most: int | None
) -> None:
    """Whatever was asked before: nothing is held twice, or by two, and as much is reused as anyone holds."""
    kept = PrefixCache(_Nothing, budget, most_live=2, moves_to_host=moves)  # type: ignore[arg-type]
    kept.most_live_tokens = most
    in_use: list[Conversation] = []
    for prompt, ends in steps:
        known = [*kept._kept.values(), *in_use]
        best = max((common_length(each.ids, prompt[:-1]) for each in known), default=0)
        taken = kept.take(prompt)
        assert taken.ids == prompt[:best]
        assert all(taken is not other for other in in_use)
        taken.ids = list(prompt)
        taken.num_before = len(prompt) - 1
        in_use.append(taken)
        if ends or len(in_use) > 1:
            kept.put(in_use.pop(0))
        assert not any(each in kept._kept.values() for each in in_use)
        assert kept._num_live() + len(in_use) <= 2 or not moves
        if moves and most is not None:
            kept.hold(0)
            held = 10 * (kept._num_live() + len(in_use) + len(kept._free))
            assert held <= max(most, 10 * len(in_use))
