"""Steps of several conversations at once are each conversation's own steps."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.engine.memory.growing_cache import GrowingCache
from hybrimoe_kt.engine.steps.layer_loop import LayerLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.runtime import Job, Runtime
from tests.support.generated_model import GeneratedModel, Shape, Type

from . import llama_cpp_converter
from .families import random_model, save_checkpoint
from .test_equality import SHAPES
from .test_layer_graphs import resident_bytes

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
Make = Callable[[Shape], GeneratedModel]

WITHIN = 1e-3
"""Of log-probabilities. Measured: 0 everywhere with ggml 0.20.2 on AVX2, whose products go column by column."""
BOUNDARIES = (1, 127, 128, 129, 300, 700)
"""Graphs look at 128 tokens more at a time, memory grows by 256."""


class Model:
    """A model and its loop."""

    def __init__(self, path: Path, *, kv_cache_type: str = "f16", **overrides: Any) -> None:
        options = {"accelerator": "none", "cpu_backend": "ggml", **overrides}
        self.loaded = load_model(path, option_overrides=options, progress=False, kv_cache_type=kv_cache_type)
        engine = self._engine = TokenGenerator(self.loaded, set())
        assert isinstance(engine.loop, LayerLoop)
        self.loop, self._random = engine.loop, random.Random(5)

    def token(self) -> int:
        return self._random.randrange(250)

    def conversation(self, length: int) -> Conversation:
        """Twice, of random tokens."""
        both, text = (self._engine.new_cache(), self._engine.new_cache()), [self.token() for _ in range(length)]
        for cache in both:
            for at in range(0, length, 32):
                self.loop.step(text[at : at + 32], cache)
        return Conversation(*both)

    def step(self, given: Sequence[Conversation]) -> float:
        """Step them together, and each alone; how far log-probabilities are apart at most."""
        ids = [self.token() for _ in given]
        wanted = [self.loop.step([token], each.alone).log_softmax(-1) for token, each in zip(ids, given, strict=True)]
        found = self.loop.step_together(ids, [each.together for each in given])
        assert found.shape == (len(given), wanted[0].numel()) and found.dtype == torch.float32
        apart = float((found.log_softmax(-1) - torch.stack(wanted)).abs().max())
        assert apart <= WITHIN  # nor is it not a number
        return apart


@dataclasses.dataclass(eq=False)
class Conversation:
    """One that steps with others, and the same one that steps alone."""

    together: GrowingCache
    alone: GrowingCache

    @property
    def length(self) -> int:
        return int(self.together.get_seq_length())


Tiny = Callable[[str], Model]


@pytest.fixture(scope="module")
def tiny(generated: Make) -> Tiny:
    """Return a function that loads the model of a shape once."""
    return functools.cache(lambda name: Model(generated(dataclasses.replace(SHAPES[name], context=1024)).path))


def schedule(model: Model, lengths: Sequence[int], num_steps: int) -> None:
    """Conversations that grow, join, leave and change places; now and then one steps by itself."""
    given = [model.conversation(length) for length in lengths]
    for number in range(num_steps):
        model.step(given)
        given = [*given[1:], given[0]]
        if number % 5 == 3:
            model.step(given[: 1 + number % 2])
        if number == num_steps // 2:
            given = [*given[:-2], model.conversation(255)]
    assert all(each.length == each.alone.get_seq_length() for each in given)


QUICK = ("qwen3moe", "deepseek2-old-kv_b-q_lora-yarn", "qwen3next")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SHAPES]
)
def test_each_goes_on_as_it_would_alone(tiny: Tiny, name: str) -> None:
    schedule(tiny(name), BOUNDARIES[:5], 12)


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("name", QUICK)
def test_long_ones_grow_past_boundaries(generated: Make, name: str, kv_cache_type: str) -> None:
    shape = dataclasses.replace(SHAPES[name], context=2048, head_dim=32, rope_dim=32)
    schedule(Model(generated(shape).path, kv_cache_type=kv_cache_type), (*BOUNDARIES, 250, 500), 140)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", "granitemoe", "mellum"])
def test_windows_sinks_and_factors_are_each_rows_own(name: str, tmp_path: Path) -> None:
    """In files of llama.cpp's converter."""
    root = llama_cpp_converter.find()
    if root is None:
        pytest.skip(llama_cpp_converter.MISSING)
    save_checkpoint(name, random_model(name), tmp_path)
    llama_cpp_converter.convert([tmp_path], root)
    schedule(Model(tmp_path / "model.gguf"), (1, 20, 31, 32, 33, 127, 128, 300), 40)


def test_the_embedded_model_goes_on_as_it_would_alone(embedded_model: Path) -> None:
    schedule(Model(embedded_model), (1, 127, 128, 300), 6)


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("name", ["qwen3moe", "qwen3next"])
def test_any_schedule_is_that_of_each_alone(tiny: Tiny, name: str, data: st.DataObject) -> None:
    """Joining, leaving, in any order, stepping alone and going back in between."""
    model = tiny(name)
    given: list[Conversation] = []
    for _ in range(data.draw(st.integers(1, 8))):
        move = data.draw(st.sampled_from(["join", "join", "leave", "alone", "together", "together", "back"]))
        if move == "join" or not given:
            given.append(model.conversation(data.draw(st.sampled_from([0, 1, 2, 30, 126, 127, 128, 254, 256]))))
        elif move == "leave":
            given.pop(data.draw(st.integers(0, len(given) - 1)))
        elif move == "back" and given[0].together.is_croppable and given[0].length > 3:
            for cache in (given[0].together, given[0].alone):
                cache.crop(-3)
        elif move == "alone":
            token, each = model.token(), data.draw(st.sampled_from(given))
            found = model.loop.step([token], each.together).clone()
            assert torch.equal(found, model.loop.step([token], each.alone))
        else:
            model.step(data.draw(st.permutations(given))[: data.draw(st.integers(1, len(given)))])
        if given:
            model.step(given)


def test_sixteen_step_at_once_and_no_more_than_rules_say(tiny: Tiny) -> None:
    model = tiny("qwen3moe")
    model.step([model.conversation(20 * number) for number in range(16)])
    assert model.loop.takes_together(16, 10**6) and model.loop.takes_together(1, 1)
    assert not model.loop.takes_together(33, 100) and not model.loop.takes_together(0, 100)


def test_experts_are_told_that_all_rows_decode(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is planned, as on a CPU alone."""
    model, told, counted = tiny("qwen3moe"), [], []
    begin, count = Runtime.begin, Coordinator.count_on_cpu

    def note(self: Runtime, layer: int, routed: Routed, *further: Any) -> Job:
        told.append((layer, len(routed.ids), routed.phase))
        return begin(self, layer, routed, *further)

    def note_count(
        self: Coordinator, layer: int, loads: Mapping[int, int], num_tokens: int, *, is_decode: bool
    ) -> float:
        counted.append((layer, sum(loads.values()), num_tokens, is_decode))
        return count(self, layer, loads, num_tokens, is_decode=is_decode)

    given = [model.conversation(3) for _ in range(3)]
    monkeypatch.setattr(Runtime, "begin", note)
    monkeypatch.setattr(Coordinator, "count_on_cpu", note_count)
    model.loop.step_together([1, 2, 3], [each.together for each in given])
    assert told == [(0, 3, "decode"), (1, 3, "decode")]
    assert counted == [(0, 6, 3, True), (1, 6, 3, True)]


@pytest.mark.parametrize("cache_size", [0, 3, pytest.param("all", marks=pytest.mark.slow)])
def test_no_bit_depends_on_where_experts_run(generated: Make, cache_size: int | str) -> None:
    """All experts by the reference; the accelerator's policies and prefetches learn from such steps."""
    path, rows = generated(Shape(layers=3, dense_type=Type.Q8_0)).path, []
    for place in ({"accelerator": "none"}, {"accelerator": "emulated", "cache_size": cache_size, "prefetch_size": 2}):
        model = Model(path, cpu_backend="torch_reference", **place)
        given = [model.conversation(length).together for length in (3, 40, 130)]
        rows.append(torch.stack([model.loop.step_together([1, 2, 3], given).clone() for _ in range(4)]))
    assert torch.equal(rows[0], rows[1])


def test_memory_is_flat_however_conversations_come_and_go(tiny: Tiny) -> None:
    """Of graphs, masks and what lies between; conversations take theirs with them."""
    model = tiny("qwen3moe")

    def come_and_go(rounds: int) -> None:
        for number in range(rounds):
            given = [model.conversation(length).together for length in (1, 100 + number % 30, 250)[: 2 + number % 2]]
            for _ in range(4):
                model.loop.step_together([1] * len(given), given)

    come_and_go(4)
    gc.collect()
    before = resident_bytes()
    come_and_go(10)
    gc.collect()
    assert resident_bytes() - before <= 4 * 2**20
    assert len(model.loaded.dense.memory._rows_graphs) <= 64
