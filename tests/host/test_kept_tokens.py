"""The tokens that may be drawn, against Transformers' logits warpers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybrimoe_kt.engine.kept_tokens import draw_from, kept_tokens


def by_warpers(
    scores: torch.Tensor, temperature: float, top_p: float, top_k: int, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities that they leave, and those of all tokens at this temperature."""
    warpers: list[object] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    unused: Any = torch.empty(1, 0, dtype=torch.long)
    left = LogitsProcessorList(warpers)(unused, scores[None].double())[0]
    return left.softmax(-1), (scores.double() / temperature).softmax(-1)


def shares_of(scores: torch.Tensor, *options: Any) -> torch.Tensor:
    tokens, weights = kept_tokens(scores.numpy(), *options)
    found = torch.zeros(len(scores), dtype=torch.float64)
    at = slice(None) if tokens is None else torch.from_numpy(tokens)
    found[at] = torch.from_numpy(weights).double()
    return found / found.sum()


OPTIONS = st.tuples(
    st.sampled_from([0.05, 0.7, 1.0, 2.5]),
    st.sampled_from([0.0, 0.3, 0.8, 0.95, 0.999, 1.0]),
    st.sampled_from([0, 1, 3, 40, 5000]),
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 50, 2000]), st.sampled_from([0.01, 1.0, 3.0, 20.0]), OPTIONS)
def test_they_are_those_of_the_warpers(seed: int, vocab: int, spread: float, options: tuple[Any, ...]) -> None:
    """But for tokens within rounding of where a limit falls."""
    temperature, top_p, top_k, min_p = options
    scores = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread
    wanted, whole = by_warpers(scores, temperature, top_p, top_k, min_p)
    found = shares_of(scores, temperature, top_p, top_k, min_p)
    assert found.isfinite().all() and (found > 0).any()
    differ = ((found > 0) != (wanted > 0)).nonzero().flatten()
    if len(differ):
        assert len(differ) == 1 or float(whole[differ].sum()) < 1e-5
        return
    assert torch.allclose(found, wanted, rtol=2e-5, atol=1e-9)


@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 10))
def test_of_equal_tokens_the_first_are_kept(vocab: int, place: int, top_k: int) -> None:
    scores = np.zeros(vocab, dtype=np.float32)
    tokens, weights = kept_tokens(scores, 1.0, 1.0, top_k)
    assert tokens is not None
    assert tokens.tolist() == list(range(min(vocab, top_k)))
    assert weights.tolist() == [1.0] * len(tokens)
    scores[place % vocab] = 1
    tokens, _ = kept_tokens(scores, 1.0, 1.0, top_k)
    assert tokens is not None
    assert set(tokens.tolist()) == {place % vocab, *[n for n in range(vocab) if n != place % vocab][: top_k - 1]}


@pytest.mark.parametrize("options", [(1.0, 1.0, 0, 0.0), (1.0, 0.9, 0, 0.0), (1.0, 0.9, 50, 0.0), (2.0, 1.0, 0, 0.1)])
def test_what_may_not_be_drawn_never_is(options: tuple[Any, ...]) -> None:
    """Whether a form leaves it out, with minus infinity, or a bias does."""
    scores = torch.randn(500, generator=torch.Generator().manual_seed(1))
    left_out = torch.arange(500) % 5 != 3
    for low in (-torch.inf, -1e9):
        tokens, weights = kept_tokens(scores.masked_fill(left_out, low).numpy(), *options)
        places = np.flatnonzero(weights)
        drawn = places if tokens is None else tokens[places]
        assert len(drawn) and not left_out[torch.from_numpy(drawn)].any()


def test_a_weight_is_met_as_often_as_it_is_large() -> None:
    weights = np.array([0.0, 3.0, 0.0, 1.0, 0.0], dtype=np.float32)
    assert Counter(draw_from(weights, number / 100) for number in range(100)) == {1: 75, 3: 25}
    assert draw_from(weights, np.nextafter(1.0, 0.0)) == 3
    assert draw_from(weights, 0.0) == 1
