"""Graphs of whole decoder layers without their experts, against the same in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml import pool as pools
from hybrimoe_kt.backends.ggml.choice import Choice, choice_of, choose
from hybrimoe_kt.backends.ggml.dense_layer import DenseLayer, DenseMemory
from hybrimoe_kt.backends.ggml.key_values import KeyValues
from hybrimoe_kt.backends.ggml.parts import (
    GroupedQuery,
    LayerParts,
    Matrix,
    Norm,
    Rotary,
    SharedExpert,
    Swiglu,
)
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.errors import ConfigError

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")

HIDDEN, EXPERTS, EPSILON, FACTOR = 64, 8, 1e-6, 0.7
WITHIN = {"f32": 1e-5, "f16": 1e-3, "q8_0": 2e-2}
"""Of the range. Measured at most 3e-6, 2.3e-4 and 4.3e-3 with ggml 0.20.2."""


@dataclass(frozen=True)
class Case:
    """What a layer's attention may have."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    is_paired: bool = False
    is_gated: bool = False
    has_bias: bool = False
    norms: str = "head"
    window: int = 0
    has_sinks: bool = False
    cap: float = 0.0
    is_dense: bool = False
    choice: Choice = field(default_factory=lambda: Choice(3, "softmax", True, 1.5))


CASES = {
    "plain": Case(),
    "no norms": Case(norms=""),
    "norms before heads are split": Case(norms="whole"),
    "neighbours rotated": Case(is_paired=True),
    "gated": Case(is_gated=True),
    "biases": Case(has_bias=True),
    "window": Case(window=5),
    "sinks": Case(has_sinks=True),
    "soft cap": Case(cap=2.0),
    "all at once": Case(has_bias=True, window=7, has_sinks=True, cap=3.0, is_gated=True),
    "as many keys as queries": Case(heads=3, kv_heads=3),
    "one key for all": Case(heads=6, kv_heads=1),
    "no experts": Case(is_dense=True),
    "sigmoid and a bias": Case(choice=Choice(2, "sigmoid", False, 2.0, torch.linspace(-0.3, 0.3, EXPERTS))),
}


class Layer:
    """A random layer of a kind: as parts, and as a function of all hidden states at once."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self._generator = torch.Generator().manual_seed(seed)
        width, rotated = case.head_dim, case.head_dim // 2
        self.q = self._matrix(case.heads * width * (2 if case.is_gated else 1), HIDDEN)
        self.k, self.v = (self._matrix(case.kv_heads * width, HIDDEN) for _ in range(2))
        self.o = self._matrix(HIDDEN, case.heads * width)
        self.norms = [self._factors(HIDDEN) for _ in range(2)]
        widths = {"head": (width, width), "whole": (case.heads * width, case.kv_heads * width)}.get(case.norms)
        self.head_norms = [self._factors(size) for size in widths] if widths else [None, None]
        self.frequencies = 1 / (100 ** (torch.arange(0, rotated, 2).float() / rotated))
        self.sinks = self._draw(case.heads) if case.has_sinks else None
        self.router = self._draw(EXPERTS, HIDDEN)
        self.body = [self._matrix(48, HIDDEN), self._matrix(48, HIDDEN), self._matrix(HIDDEN, 48)]
        self.gate = self._matrix(1, HIDDEN)

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _factors(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self._generator) + 0.5

    def _matrix(self, rows: int, columns: int) -> Matrix:
        values = self._draw(rows, columns) / math.sqrt(columns)
        bias = self._draw(rows) / 10 if self.case.has_bias else None
        return Matrix((PackedMatrix("w", values.view(torch.uint8).flatten(), ggml.F32, rows, columns),), bias)

    def parts(self) -> LayerParts:
        case = self.case
        norms = [None if factors is None else Norm(factors, EPSILON) for factors in self.head_norms]
        attention = GroupedQuery(
            self.q, self.k, self.v, self.o, case.heads, case.kv_heads, case.head_dim, case.head_dim**-0.5,
            Rotary(1 / self.frequencies, case.is_paired, 1.1), norms[0], norms[1], case.is_gated, case.window,
            self.sinks, case.cap,
        )  # fmt: skip
        first, second = (Norm(factors, EPSILON) for factors in self.norms)
        made = LayerParts(first, attention, second, residual_factor=FACTOR)
        if case.is_dense:
            return replace(made, dense=Swiglu(*self.body))
        shared = (SharedExpert(Swiglu(*self.body), self.gate),)
        return replace(made, router=self.router, choice=case.choice, shared=shared)

    def __call__(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the graph leaves, for a whole conversation `[tokens, hidden]`."""
        residual = hidden + FACTOR * self._attention(_norm(hidden, self.norms[0]))
        normed = _norm(residual, self.norms[1])
        gate, up, down = (_times(matrix) for matrix in self.body)
        body = down(functional.silu(gate(normed)) * up(normed))
        if self.case.is_dense:
            return {"residual": residual + FACTOR * body}
        shared = body * _times(self.gate)(normed).sigmoid()
        logits = normed @ self.router.t()
        weights, ids = choose(self.case.choice, logits)
        found = {"residual": residual + FACTOR * shared, "normed": normed, "logits": logits}
        return found | {"chosen": _spread(weights, ids)}

    def _attention(self, hidden: torch.Tensor) -> torch.Tensor:
        case, tokens = self.case, len(hidden)
        query, key, value = (_times(matrix)(hidden) for matrix in (self.q, self.k, self.v))
        gate = None
        if case.is_gated:
            query, gate = query.view(tokens, case.heads, 2, case.head_dim).unbind(2)
            query = query.flatten(1)
        query, key = self._heads(query, case.heads, 0), self._heads(key, case.kv_heads, 1)
        group = case.heads // case.kv_heads
        logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * case.head_dim**-0.5
        if case.cap:
            logits = case.cap * torch.tanh(logits / case.cap)
        place = torch.arange(tokens)
        seen = place <= place[:, None]
        if case.window:
            seen &= place > place[:, None] - case.window
        logits = logits.masked_fill(~seen, -math.inf)
        if self.sinks is not None:
            logits = torch.cat((logits, self.sinks[:, None, None].expand(-1, tokens, 1)), -1)
        shares = logits.softmax(-1)[..., :tokens]
        values = value.view(tokens, case.kv_heads, -1).repeat_interleave(group, 1)
        answer = torch.einsum("hqk,khd->qhd", shares, values).flatten(1)
        return _times(self.o)(answer if gate is None else answer * gate.flatten(1).sigmoid())

    def _heads(self, values: torch.Tensor, heads: int, which: int) -> torch.Tensor:
        factors, tokens = self.head_norms[which], len(values)
        if self.case.norms == "whole":
            values = _norm(values, factors)
        values = values.view(tokens, heads, -1)
        if self.case.norms == "head":
            values = _norm(values, factors)
        angles = (torch.arange(tokens)[:, None] * self.frequencies)[:, None]
        cos, sin, size = angles.cos() * 1.1, angles.sin() * 1.1, 2 * len(self.frequencies)
        turned, rest = values[..., :size], values[..., size:]
        if self.case.is_paired:
            first, second = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
        else:
            first, second = turned.chunk(2, -1)
            turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
        return torch.cat((turned, rest), -1)


def _norm(values: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    assert factors is not None
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPSILON) * factors


def _times(matrix: Matrix) -> Any:
    (part,) = matrix.parts
    weight = part.data.view(torch.float32).view(part.rows, part.columns)
    return lambda given: functional.linear(given, weight, matrix.bias)


def _spread(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), EXPERTS).scatter_(1, ids.long(), weights)


def steps(layer: DenseLayer, held: KeyValues, hidden: torch.Tensor, sizes: Sequence[int]) -> dict[str, torch.Tensor]:
    """What the graphs leave for `hidden`, in steps of these sizes."""
    found: dict[str, list[torch.Tensor]] = {}
    at = 0
    for size in sizes:
        step = layer.memory.step(size)
        layer.begin(step, held.length).copy_(hidden[at : at + size])
        answer = layer.compute(held, step)
        parts = {"residual": answer.residual, "normed": answer.normed, "logits": answer.logits}
        if answer.weights is not None and answer.ids is not None:
            parts["chosen"] = _spread(answer.weights, answer.ids)
        for name, value in parts.items():
            if value is not None:
                found.setdefault(name, []).append(value.clone())
        at += size
    return {name: torch.cat(values) for name, values in found.items()}


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], within: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if name == "chosen" and within > 1e-4:
            continue  # rounded keys may exchange the last two
        assert (found[name] - value).abs().max() <= within * value.abs().max(), name


@pytest.mark.parametrize("type_name", ["f32", "f16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_layer_is_what_it_is_in_torch(case: Case, type_name: str) -> None:
    layer = Layer(case)
    dense = DenseLayer(layer.parts(), DenseMemory(HIDDEN))
    sizes = (5, 1, 1, 7, 1, 32, 32, 32, 1, 30, 1, 1)  # past the first bucket of positions
    hidden = torch.randn(sum(sizes), HIDDEN)
    found = steps(dense, dense.new_held(type_name), hidden, sizes)
    assert_alike(found, layer(hidden), WITHIN[type_name])


@pytest.mark.parametrize("case", [Case(head_dim=32), Case(head_dim=32, window=9, has_sinks=True, cap=2.0)])
def test_blocks_of_8_bits_are_read_by_flash_attention(case: Case) -> None:
    layer = Layer(case)
    dense = DenseLayer(layer.parts(), DenseMemory(HIDDEN))
    sizes = (7, 1, 1, 32, 1)
    hidden = torch.randn(sum(sizes), HIDDEN)
    assert_alike(steps(dense, dense.new_held("q8_0"), hidden, sizes), layer(hidden), WITHIN["q8_0"])


@pytest.mark.parametrize("head_dim", [16, 48])
def test_blocks_of_other_heads_are_refused(head_dim: int) -> None:
    """ggml's flash attention ends the process, or reads over a head's end."""
    dense = DenseLayer(Layer(Case(head_dim=head_dim)).parts(), DenseMemory(HIDDEN))
    assert f"these are {head_dim}" in (dense.refuses("q8_0") or "")
    assert dense.refuses("f16") is None and dense.refuses("f32") is None


@hypothesis.given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 3), st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_how_a_conversation_is_cut_and_cropped_changes_nothing(sizes: list[int], seed: int, data: Any) -> None:
    layer = Layer(Case(window=11), seed)
    dense = DenseLayer(layer.parts(), DenseMemory(HIDDEN))
    held = dense.new_held("f32")
    hidden = torch.randn(sum(sizes), HIDDEN, generator=torch.Generator().manual_seed(seed))
    steps(dense, held, torch.randn(sum(sizes), HIDDEN), sizes)  # another conversation, forgotten but for its memory
    kept = data.draw(st.integers(0, sum(sizes) - 1))
    held.crop(0)
    steps(dense, held, hidden[: kept + 1], [1] * (kept + 1))
    held.crop(kept)
    found = steps(dense, held, hidden[kept:], [sum(sizes) - kept])
    assert_alike(found, {name: value[kept:] for name, value in layer(hidden).items()}, WITHIN["f32"])


@pytest.mark.parametrize("type_name", ["f32", "f16"])
def test_the_number_of_threads_changes_no_bit(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads come and go as other programs want the cores."""
    layer, found = Layer(Case(heads=8, kv_heads=2)), []
    hidden, sizes = torch.randn(700, HIDDEN), [32] * 21 + [7] * 3 + [1] * 7
    for threads in (1, 2):
        dense = DenseLayer(layer.parts(), DenseMemory(HIDDEN))
        with monkeypatch.context() as patch:
            patch.setattr(pools.pool()._free, "of", lambda number, threads=threads: min(number, threads))
            found.append(steps(dense, dense.new_held(type_name), hidden, sizes))
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name]), name


def test_ids_are_valid_whatever_the_hidden_states_are() -> None:
    dense = DenseLayer(Layer(Case()).parts(), DenseMemory(HIDDEN))
    for odd in (math.nan, math.inf, -math.inf):
        held, step = dense.new_held("f16"), dense.memory.step(2)
        hidden = dense.begin(step, 0)
        hidden.normal_()
        hidden[1, 3] = odd
        answer = dense.compute(held, step)
        assert answer.ids is not None and answer.weights is not None
        assert 0 <= int(answer.ids.min()) <= int(answer.ids.max()) < EXPERTS
        assert not answer.weights[1].isfinite().all()  # which whoever computes experts complains of


def test_memory_for_keys_grows_in_steps_and_is_kept() -> None:
    held = KeyValues(6, 4)
    keys, values = torch.randn(700, 6), torch.randn(700, 4)
    capacities = []
    for at in range(700):
        held.append(keys[at : at + 1], values[at : at + 1])
        capacities.append(held.capacity)
    assert sorted(set(capacities)) == [256, 512, 768]
    assert held.num_bytes == 768 * 2 * (6 + 4)
    assert torch.equal(held.read_keys(), keys.half().float())
    assert torch.equal(held.read_values(), values.half().float().t())
    other = copy.deepcopy(held)
    assert other.keys.address == other.keys.memory.data_ptr() != held.keys.address
    held.crop(3)
    assert (held.length, held.capacity) == (3, 768)
    assert torch.equal(held.read_keys(), keys[:3].half().float())
    with pytest.raises(ConfigError, match="f16"):
        KeyValues(6, 4, "f61")


def test_keys_of_8_bits_are_what_ggml_makes_of_them() -> None:
    held = KeyValues(64, 32, "q8_0")
    keys, values = torch.randn(300, 64), torch.randn(300, 32)
    held.append(keys[:7], values[:7])
    held.append(keys[7:], values[7:])
    assert (held.read_keys() - keys).abs().max() < 0.02
    assert (held.read_values() - values.t()).abs().max() < 0.02


ROUTERS = {
    "softmax": Choice(2, "softmax", False),
    "normalised": Choice(2, "softmax", True, 2.5),
    "sigmoid": Choice(3, "sigmoid", True, 1.0, torch.linspace(-0.2, 0.2, EXPERTS)),
    "groups of two": Choice(2, "sigmoid", True, 1.5, torch.zeros(EXPERTS), 4, 2),
    "groups of one": Choice(2, "softmax", False, 16.0, None, 4, 2, False),
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_a_choice_is_found_by_what_it_chose(router: Choice) -> None:
    logits = 2 * torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(3))
    weights, ids = choose(router, logits)
    found = choice_of(
        logits, weights, ids, factor=router.factor, bias=router.bias, num_groups=router.num_groups,
        num_best_groups=router.num_best_groups,
    )  # fmt: skip
    assert found is not None
    again = torch.randn(50, EXPERTS)
    assert torch.allclose(_spread(*choose(found, again)), _spread(*choose(router, again)))


def test_a_choice_nobody_knows_is_none() -> None:
    logits = torch.randn(64, EXPERTS)
    weights, ids = choose(ROUTERS["softmax"], logits)
    assert choice_of(logits, weights.square(), ids) is None
    assert choice_of(logits, weights, (ids + 1) % EXPERTS) is None
