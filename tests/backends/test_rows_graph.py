"""Graphs of several conversations' tokens, against each conversation alone: bit for bit, as weights are floats here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from hybrimoe_kt.backends.ggml import dense_layer, words
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml.dense_layer import DenseLayer, DenseMemory
from hybrimoe_kt.backends.ggml.kinds import LayerKind
from hybrimoe_kt.backends.ggml.step_memory import DenseAnswer, Held

from .test_dense_layer import CASES, HIDDEN, Case, Layer

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")

LENGTHS = (1, 0, 127, 128, 129, 300)


def held_for(layer: DenseLayer, type_name: str, lengths: Sequence[int]) -> list[Held]:
    """Conversations of these lengths, of random tokens."""
    found = []
    for length in lengths:
        held = layer.new_held(type_name)
        for at in range(0, length, 32):
            step = layer.memory.step(min(32, length - at))
            layer.begin(step, held.length).normal_()
            layer.compute(held, step)
        found.append(held)
    return found


def together(layer: DenseLayer, held: Sequence[Held], hidden: torch.Tensor) -> DenseAnswer:
    layer.memory.rows.begin([each.length for each in held]).copy_(hidden)
    return cloned(layer.compute_rows(held))


def alone(layer: DenseLayer, held: Sequence[Held], hidden: torch.Tensor) -> DenseAnswer:
    rows = []
    for each, token in zip(held, hidden, strict=True):
        step = layer.memory.step(1)
        layer.begin(step, each.length).copy_(token)
        rows.append(cloned(layer.compute(each, step)))
    return DenseAnswer(*(None if of[0] is None else torch.cat(of) for of in zip(*rows, strict=True)))


def cloned(answer: DenseAnswer) -> DenseAnswer:
    return DenseAnswer(*(None if value is None else value.clone() for value in answer))


def assert_same(found: DenseAnswer, wanted: DenseAnswer) -> None:
    assert wanted.residual.isfinite().all()
    for name, value, expected in zip(DenseAnswer._fields, found, wanted, strict=True):
        assert (value is None) == (expected is None), name
        if expected is not None:
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("type_name", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_are_what_each_conversation_is_alone(case: Case, type_name: str) -> None:
    dense = DenseLayer(Layer(replace(case, head_dim=32)).parts(), DenseMemory(HIDDEN))
    ours = held_for(dense, type_name, LENGTHS)
    theirs = copy.deepcopy(ours)
    order = torch.arange(len(LENGTHS))
    for number in range(5):
        hidden = torch.randn(len(order), HIDDEN)
        found = together(dense, [ours[place] for place in order], hidden)
        assert_same(found, alone(dense, [theirs[place] for place in order], hidden))
        order = torch.randperm(len(LENGTHS))[: number + 2]  # others, in another order
    for each, other in zip(ours, theirs, strict=True):
        assert each.length == other.length
        assert torch.equal(each.read_keys(), other.read_keys()) and torch.equal(each.read_values(), other.read_values())


def test_layers_of_a_kind_share_graphs_and_no_weights() -> None:
    memory = DenseMemory(HIDDEN)
    layers = [DenseLayer(Layer(case, seed).parts(), memory) for case in (Case(), Case(window=9)) for seed in (1, 2)]
    held = [held_for(layer, "f16", (3, 130)) for layer in layers]
    theirs = copy.deepcopy(held)
    for _ in range(2):
        for layer, ours, other in zip(layers, held, theirs, strict=True):
            hidden = torch.randn(2, HIDDEN)
            assert_same(together(layer, ours, hidden), alone(layer, other, hidden))
    assert len(memory._rows_graphs) == 2


def test_what_is_shared_within_a_layer_is_part_of_its_kind() -> None:
    kinds: dict = {}
    first, second = (Layer(Case(), seed).parts() for seed in (1, 2))
    tied = replace(second, feed_forward_norm=second.attention_norm)
    numbers = [LayerKind(parts, kinds).number for parts in (first, second, tied, replace(first, residual_factor=0.5))]
    assert numbers == [0, 0, 1, 2]


def test_graphs_are_few_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each number of rows, however long; the latest used of too many."""
    monkeypatch.setattr(dense_layer, "_MOST_ROWS_GRAPHS", 3)
    dense = DenseLayer(Layer(Case()).parts(), DenseMemory(HIDDEN))
    held = held_for(dense, "f16", (1, 100, 127, 250, 500))
    graphs = dense.memory._rows_graphs
    for num in (2, 3, 4):
        together(dense, held[:num], torch.randn(num, HIDDEN))
    made = list(graphs.values())
    for _ in range(30):
        for num in (4, 3, 2):
            together(dense, held[-num:], torch.randn(num, HIDDEN))
    assert {id(graph) for graph in made} == {id(graph) for graph in graphs.values()}
    theirs = copy.deepcopy(held)
    hidden = torch.randn(5, HIDDEN)
    assert_same(together(dense, held, hidden), alone(dense, theirs, hidden))
    assert len(graphs) == 3


def test_words_follow_from_their_rows() -> None:
    context = ggml.Context(ggml.library(), 2)
    first, second = context.tensor(ggml.F32, 4), context.tensor(ggml.F16, 8, 3)
    written = words.Words(
        [
            words.Word(first, ggml.DATA, 0, words.Fact.FIRST, 1, 7),
            words.Word(second, ggml.DATA, 1, words.Fact.SECOND, 1, 0, 16),
            words.Word(second, ggml.STRIDES + 1, 1, words.Fact.CAPACITY, 2),
        ]
    )
    rows = torch.arange(2 * words.FACTS).view(2, -1) * 10
    written.write(rows.flatten().numpy())
    second_place = words.FACTS + words.Fact.SECOND, words.FACTS + words.Fact.PLACE
    assert words.words_of(first)[ggml.DATA] == 7
    assert words.words_of(second)[ggml.DATA] == 10 * second_place[0] + 16 * 10 * second_place[1]
    assert words.words_of(second)[ggml.STRIDES : ggml.STRIDES + 2] == [2, 20 * (words.FACTS + words.Fact.CAPACITY)]
    assert words.words_of(second)[ggml.SIZES : ggml.SIZES + 2] == [8, 3]
