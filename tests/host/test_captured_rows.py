"""Captured steps of several conversations: the eager ones' bits, across joins, growths and failures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.generation import Generation
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.steps import joint_rows
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.steps.captured_rows import CapturedRows
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import LoadedModel
from tests.host.test_equality import SHAPES
from tests.support.captured_steps import load
from tests.support.generated_model import GeneratedModel, Shape

pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[Shape], GeneratedModel]


def generator(loaded: LoadedModel, *, captures: bool = True, parallel: int = 4) -> TokenGenerator:
    made = TokenGenerator(loaded, set(), captures=True, parallel=parallel, cache_ram=2**28)
    assert isinstance(made.loop, CapturedLoop)
    made.loop.captures = captures
    return made


def rows_of(made: TokenGenerator) -> CapturedRows:
    assert made.steps.captured_rows is not None
    return made.steps.captured_rows


def begin(made: TokenGenerator, seed: int, length: int, num_tokens: int) -> Generation:
    prompt = random.Random(seed).choices(range(250), k=length)
    return made.begin(prompt, Sampling(max_new_tokens=num_tokens, temperature=0, num_logprobs=3))


def answers(made: TokenGenerator, sizes: list[tuple[int, int]], gap: int = 3) -> list[list[Any]]:
    """Tokens and log-probabilities of answers that come one after the other, `gap` steps between them."""
    begun: list[Generation] = []
    for seed, (length, num_tokens) in enumerate(sizes):
        begun.append(begin(made, seed, length, num_tokens))
        for _ in range(gap):
            made.step()
    for _ in range(1000):
        if all(one.is_over for one in begun):
            break
        made.step()
    assert all(one.is_over and one.error is None for one in begun)
    told = []
    for one in begun:
        drawn = []
        while (sampled := one.take()) is not None:
            drawn.append((sampled.token, sampled.logprob, sampled.likeliest))
        told.append(drawn)
    return told


SIZES = [(12, 30), (3, 24), (25, 40), (7, 12)]


@pytest.mark.parametrize("cache_size", [0.5, "all", 0])
@pytest.mark.parametrize("name", ["qwen3moe", "deepseek3", "qwen3next"])
def test_replayed_steps_are_the_eager_ones(
    generated: Make, name: str, cache_size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One joins and one leaves in the middle, and the memory of all grows."""
    monkeypatch.setattr(joint_rows, "_LEAST_ROOM", 16)
    model = generated(SHAPES[name])
    eager, replayed = (generator(load(model, cache_size=cache_size), captures=captures) for captures in (False, True))
    wanted, found = (answers(made, SIZES) for made in (eager, replayed))
    assert found == wanted
    assert rows_of(eager).num_captures == 0 < 3 <= rows_of(replayed).num_captures


def test_most_steps_ask_no_module(generated: Make) -> None:
    made = generator(load(generated(SHAPES["qwen3moe"])))
    begun = [begin(made, seed, 5, 40) for seed in range(4)]
    while made.batch.num_answering < 4:
        made.step()
    asked: list[object] = []
    made.model.model.layers[0].register_forward_hook(lambda *_: asked.append(1))
    for _ in range(30):
        made.step()
    assert len(asked) == 2, "one step to warm up, and one that is captured"
    assert all(len(one.ids) > 30 for one in begun)
    made.steps.captured_rows = None
    for one in begun:
        made.leave(one)


def test_a_replay_that_is_lost_is_computed_again(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its conversations are, as nobody knows how far it came."""
    from hybrimoe_kt.device.step_graph import StepLost

    model = generated(SHAPES["qwen3moe"])
    wanted = answers(generator(load(model), captures=False), SIZES)
    made = generator(load(model))
    tokens = []
    step, count = CapturedRows.step, [0]

    def failing(self: CapturedRows, given: torch.Tensor, rows: Any) -> torch.Tensor:
        logits = step(self, given, rows)
        count[0] += 1
        if count[0] in (6, 9):
            raise StepLost("injected")
        return logits

    monkeypatch.setattr(CapturedRows, "step", failing)
    tokens = [[drawn[0] for drawn in answer] for answer in answers(made, SIZES)]
    assert tokens == [[drawn[0] for drawn in answer] for answer in wanted]
    assert count[0] > 9


def test_a_driver_that_refuses_is_asked_no_more(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrimoe_kt.device.step_graph import CaptureError
    from hybrimoe_kt.runtime.step_pieces import StepPieces

    model = generated(SHAPES["qwen3moe"])
    wanted = answers(generator(load(model), captures=False), SIZES)
    made = generator(load(model))

    def refuse(_: StepPieces) -> None:
        raise CaptureError("no captures today")

    monkeypatch.setattr(StepPieces, "begin_capture", refuse)
    tokens = [[drawn[0] for drawn in answer] for answer in answers(made, SIZES)]
    assert tokens == [[drawn[0] for drawn in answer] for answer in wanted]
    assert isinstance(made.loop, CapturedLoop) and not made.loop.captures


def test_states_that_have_moved_are_captured_anew(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear attention's lie in the rows' memory until their conversation leaves it, also when its keys have moved."""
    monkeypatch.setattr(joint_rows, "_LEAST_ROOM", 4)
    model = generated(SHAPES["qwen3next"])
    told = []
    for captures in (False, True):
        made = generator(load(model), captures=captures)
        long, short = begin(made, 0, 9, 40), begin(made, 1, 5, 6)
        while not long.is_over:
            made.step()
        assert short.is_over
        longer = [*long.ids, 3, 5]
        told.append((long.ids, list(made.tokens(longer, Sampling(max_new_tokens=12, temperature=0)))))
        assert made.last_run()["reused_tokens"] == len(long.ids) - 1
    assert told[0] == told[1]
