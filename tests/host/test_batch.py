"""Several answers at once: each one's tokens are those it has alone, whenever it comes, leaves, or fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrimoe_kt.engine import batch as batch_module
from hybrimoe_kt.engine.generation import Generation
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.steps.layer_loop import LayerLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import CapacityError, KernelError
from hybrimoe_kt.host.hf.loading import load_model
from tests.host.test_equality import SHAPES
from tests.support.by_modules import by_modules
from tests.support.generated_model import GeneratedModel, Shape

Make = Callable[[Shape], GeneratedModel]
KINDS = {"attention": "qwen3moe", "latent": "deepseek3", "linear": "qwen3next"}
RAM = 2**28


def generator(model: GeneratedModel, *, parallel: int = 4, cache_ram: int = RAM, **options: Any) -> TokenGenerator:
    own = {name: options.pop(name) for name in ("kv_cache_type", "context_tokens") if name in options}
    context = own.pop("context_tokens", None)
    by_graphs = options.pop("by_graphs", False)
    overrides = {"cpu_backend": "ggml" if by_graphs else "torch_reference", "max_chunk_tokens": 8} | options
    device = "cpu" if by_graphs else "emulated:0"
    loaded = load_model(model.path, option_overrides=overrides, progress=False, device=device, **own)
    made = TokenGenerator(loaded, set(), context_tokens=context, parallel=parallel, cache_ram=cache_ram)
    if by_graphs:
        assert isinstance(made.loop, LayerLoop)
    else:
        by_modules(made)
    return made


def greedy(num_tokens: int) -> Sampling:
    return Sampling(max_new_tokens=num_tokens, temperature=0)


def drawn(generation: Generation) -> list[int]:
    """Its answer so far."""
    return generation.ids[len(generation.prompt) :]


def alone(made: TokenGenerator, prompt: list[int], num_tokens: int) -> list[int]:
    """What it answers by itself, from nothing."""
    made.reset()
    return list(made.tokens(prompt, greedy(num_tokens)))


def finish(made: TokenGenerator, most_steps: int = 2000) -> None:
    for _ in range(most_steps):
        if not made.batch.num_running + made.batch.num_waiting:
            return
        made.step()
    raise AssertionError("it never ends")


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(250), k=length)


def test_answers_side_by_side_are_those_alone(pair: tuple[TokenGenerator, TokenGenerator]) -> None:
    """Prompts of all lengths, joined in the middle of others' answers; more of them than may run."""
    made, single = pair
    asked = [(text(seed, length), 4 + 3 * seed) for seed, length in enumerate((1, 40, 9, 17, 8, 25))]
    wanted = [alone(single, prompt, most) for prompt, most in asked]
    begun = []
    sizes = set()
    for prompt, most in asked:
        begun.append(made.begin(prompt, greedy(most)))
        for _ in range(3):
            made.step()
            sizes.add(made.batch.num_answering)
    finish(made)
    assert [drawn(one) for one in begun] == wanted
    assert max(sizes) >= 2, "none was beside another"
    assert all(one.run.finish == "length" and one.error is None for one in begun)
    assert made.steps._rows is None, "the memory of rows is given back"


@dataclass(frozen=True)
class Asked:
    """A request of a schedule: it shares the first `shared` tokens with others."""

    shared: int
    own: int
    most: int
    waits: int
    """Steps before it comes."""
    leaves_after: int | None
    """Steps after which nobody wants it any more."""


ASKED = st.builds(
    Asked, st.integers(0, 30), st.integers(1, 20), st.integers(1, 12), st.integers(0, 6),
    st.none() | st.integers(0, 15),
)  # fmt: skip
COMMON = text(99, 30)


@pytest.fixture(scope="module", params=[*KINDS, *(f"{kind}, graphs" for kind in KINDS)])
def pair(request: pytest.FixtureRequest, generated: Make) -> tuple[TokenGenerator, TokenGenerator]:
    """The same model twice: for several answers, and for one."""
    kind, _, how = request.param.partition(", ")
    model, by_graphs = generated(SHAPES[KINDS[kind]]), how == "graphs"
    return tuple(generator(model, parallel=most, by_graphs=by_graphs) for most in (8, 1))  # type: ignore[return-value]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=st.lists(ASKED, min_size=2, max_size=10), seed=st.integers(0, 2**16))
def test_any_schedule(pair: tuple[TokenGenerator, TokenGenerator], schedule: Sequence[Asked], seed: int) -> None:
    """Started at random times, some cancelled, with shared beginnings: no other's token is ever in an answer."""
    made, single = pair
    begun: list[tuple[Asked, Generation, threading.Event]] = []
    left = list(schedule)
    wait = left[0].waits
    for _ in range(4000):
        while left and wait <= 0:
            asked = left.pop(0)
            prompt = COMMON[: asked.shared] + text(seed + len(left), asked.own)
            stop = threading.Event()
            begun.append((asked, made.begin(prompt, greedy(asked.most), stop), stop))
            wait = left[0].waits if left else 0
        for number, (asked, _, stop) in enumerate(begun):
            if asked.leaves_after is not None and asked.leaves_after <= wait + number:
                stop.set()
        if not left and all(one.is_over for _, one, _ in begun):
            break
        made.step()
        wait -= 1
    for _, generation, stop in begun:
        wanted = alone(single, generation.prompt, generation.sampling.max_new_tokens)
        found = drawn(generation)
        assert found == wanted[: len(found)]
        assert len(found) == len(wanted) or stop.is_set()


def test_no_answer_waits_for_more_than_one_piece_of_a_prompt(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "_SHARED_CHUNK_TOKENS", 4)
    made = generator(generated(SHAPES["qwen3moe"]))
    first = made.begin([1, 2, 3], greedy(30))
    made.step()
    second = made.begin(text(1, 41), greedy(2))
    before = len(drawn(first))
    while second.is_reading:
        held = 0 if second.conversation is None else len(second.conversation.ids)
        made.step()
        now = len(second.conversation.ids) if second.conversation is not None else held
        assert now - held <= 4
        if now > held:
            assert len(drawn(first)) == before + 1, "a token between any two pieces"
            before = len(drawn(first))
    assert before >= 10
    finish(made)


def test_steps_of_several_rows_are_decode_steps(generated: Make) -> None:
    made = generator(generated(SHAPES["qwen3moe"]), accelerator="emulated", cache_size=0.5, prefetch_size=2)
    seen: list[tuple[int, bool]] = []
    plan = made.runtime.coordinator.plan

    def listening(routing: Any) -> Any:
        seen.append((routing.num_tokens, routing.is_decode))
        return plan(routing)

    made.runtime.coordinator.plan = listening  # type: ignore[method-assign]
    begun = [made.begin(text(seed, 6), greedy(5)) for seed in range(3)]
    finish(made)
    assert (3, True) in seen and (6, False) in seen
    single = generator(generated(SHAPES["qwen3moe"]), parallel=1)
    assert [drawn(one) for one in begun] == [alone(single, one.prompt, 5) for one in begun]


def test_one_that_fails_takes_no_other_along(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, single = (generator(generated(SHAPES["qwen3moe"]), parallel=most) for most in (3, 1))
    begun = [made.begin(text(seed, 5), greedy(8)) for seed in range(3)]
    while made.batch.num_answering < 3:
        made.step()
    together = made.steps.together

    def broken(*given: Any) -> torch.Tensor:
        logits = together(*given)
        assert logits is not None
        with torch.inference_mode():
            logits[1] = float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(made.steps, "together", broken)
        made.step()
    assert isinstance(begun[1].error, KernelError)
    finish(made)
    for one in (begun[0], begun[2]):
        assert drawn(one) == alone(single, one.prompt, 8)
    assert alone(made, begun[1].prompt, 8) == alone(single, begun[1].prompt, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_runs_out_in_a_common_step_is_made(generated: Make, kind: str) -> None:
    model = generated(SHAPES[KINDS[kind]])
    made = generator(model, parallel=3, accelerator="emulated", cache_size=4)
    single = generator(model, parallel=1)
    begun = [made.begin(text(seed, 5), greedy(8)) for seed in range(3)]
    while made.batch.num_answering < 3:
        made.step()
    calls = []

    def full(module: Any, *_: Any) -> None:
        calls.append(module)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 4")

    made.model.model.layers[-1].register_forward_pre_hook(full)
    finish(made)
    assert [drawn(one) for one in begun] == [alone(single, one.prompt, 8) for one in begun]
    assert len(calls) > 1 and made.runtime.health().accelerators


def test_the_last_to_come_is_set_aside_where_there_is_no_room(generated: Make) -> None:
    made = generator(generated(SHAPES["qwen3moe"]), parallel=4, context_tokens=40)
    made.batch.most_tokens = 40
    single = generator(generated(SHAPES["qwen3moe"]), parallel=1, context_tokens=40)
    begun = [made.begin(text(seed, 8), greedy(25)) for seed in range(4)]
    ended = []
    while len(ended) < 4:
        made.step()
        assert made.batch.num_tokens <= 40 or made.batch.num_running == 1
        ended += [one for one in begun if one.is_over and one not in ended]
    assert made.batch.num_set_aside > 0
    assert ended[0] is begun[0], "the first to come is never set aside"
    assert [drawn(one) for one in begun] == [alone(single, one.prompt, 25) for one in begun]
    with pytest.raises(CapacityError, match="the context holds 40"):
        made.begin(text(1, 40), greedy(1))


def test_what_runs_on_a_cpu_stays_within_a_share_of_its_memory(
    generated: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = generated(SHAPES["qwen3moe"])
    made = generator(model, parallel=4, by_graphs=True, context_tokens=100)
    assert made.batch.most_tokens == 400
    answer = made.begin(text(1, 20), greedy(2))
    finish(made)
    each = sum(layer.held.num_bytes // layer.held.capacity for layer in made.kept.take(answer.ids).cache.layers)  # type: ignore[union-attr]
    total = type("Memory", (), {"total": 4 * 250 * each, "available": 0})
    monkeypatch.setattr("hybrimoe_kt.engine.token_generator.psutil.virtual_memory", lambda: total)
    assert generator(model, parallel=4, by_graphs=True, context_tokens=100).batch.most_tokens == 250
    assert generator(model, parallel=4, by_graphs=True, context_tokens=300).batch.most_tokens == 300


def test_models_whose_layers_hold_something_else_step_in_turn(generated: Make) -> None:
    """Blocks of q8_0 do not lie in rows."""
    made, single = (generator(generated(SHAPES["qwen3moe"]), parallel=most, kv_cache_type="q8_0") for most in (3, 1))
    begun = [made.begin(text(seed, 5), greedy(6)) for seed in range(3)]
    while made.batch.num_answering < 3:
        made.step()
    conversations = [one.conversation for one in begun if one.conversation is not None]
    assert made.steps.together(conversations, [1, 2, 3]) is None
    finish(made)
    assert [drawn(one) for one in begun] == [alone(single, one.prompt, 6) for one in begun]


def test_an_unforeseen_error_in_a_common_step_ends_what_was_in_it(
    generated: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = generator(generated(SHAPES["qwen3moe"]))
    begun = [made.begin(text(seed, 5), greedy(8)) for seed in range(3)]
    while made.batch.num_answering < 3:
        made.step()

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(made.runtime, "begin", fail)
        with pytest.raises(RuntimeError, match="injected"):
            made.step()
    assert all(one.is_over and one.error is not None for one in begun)
    assert not made.batch.num_running
    single = generator(generated(SHAPES["qwen3moe"]), parallel=1)
    assert alone(made, begun[0].prompt, 8) == alone(single, begun[0].prompt, 8)
