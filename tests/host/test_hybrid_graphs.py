"""Models with linear attention run by graphs of ggml's, in steps of any size, and are the stock ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from tests.support.generated_model import GeneratedModel, Shape, Type

from .stock import greedy, logits_of, stock_model

Make = Callable[[Shape], GeneratedModel]
GREEDY = Sampling(max_new_tokens=12, temperature=0)
OPTIONS: dict[str, Any] = {"cpu_backend": "torch_reference", "accelerator": "none"}
TEXT = random.Random(5).choices(range(250), k=160)
FAMILIES = ["qwen3next", "qwen35moe"]


def shape_of(family: str, dense_type: Type = Type.F16) -> Shape:
    return Shape(architecture=family, layers=4, head_dim=64, linear_heads=(2, 6), dense_type=dense_type)


def load(model: GeneratedModel) -> LoadedModel:
    return load_model(model.path, option_overrides=OPTIONS, progress=False)


@torch.inference_mode()
@pytest.mark.parametrize("dense_type", [Type.F32, Type.F16], ids=["floats", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_stock_models(generated: Make, family: str, dense_type: Type) -> None:
    model = generated(shape_of(family, dense_type))
    wanted = logits_of(stock_model(model), TEXT)
    loaded = load(model)
    assert loaded.dense is not None, "every layer has a graph"
    steps = TokenGenerator(loaded, set())
    at = 0
    for tokens in (40, 1, 1, 7, 32, 33, 5, 1, 1):
        found = steps.append(TEXT[at : at + tokens])
        at += tokens
        torch.testing.assert_close(found, wanted[at - 1], rtol=0, atol=2e-3 * float(wanted.std()), msg=f"token {at}")


@pytest.fixture(params=FAMILIES)
def engine(request: pytest.FixtureRequest, generated: Make) -> Engine:
    made = build_engine(generated(shape_of(request.param)).path, progress=False, option_overrides=OPTIONS)
    made.end_ids = set()
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_stock_models(generated: Make, family: str) -> None:
    model = generated(shape_of(family))
    stock, steps = stock_model(model), TokenGenerator(load(model), set())
    for length in (1, 20, 45):
        assert list(steps.tokens(TEXT[:length], GREEDY)) == greedy(stock, TEXT[:length], 12)[0]


def test_a_conversation_goes_on_and_an_edited_one_is_read_anew(engine: Engine) -> None:
    first = list(engine.tokens(TEXT[:9], GREEDY))
    longer = TEXT[:9] + first[:-1] + TEXT[50:55]
    answer = list(engine.tokens(longer, GREEDY))
    assert engine.last_run()["reused_tokens"] == 9 + len(first) - 1
    edited = list(engine.tokens(TEXT[:5] + TEXT[60:70], GREEDY))
    assert engine.last_run()["reused_tokens"] == 0
    engine.reset()
    assert list(engine.tokens(longer, GREEDY)) == answer
    engine.reset()
    assert list(engine.tokens(TEXT[:5] + TEXT[60:70], GREEDY)) == edited


def test_a_step_that_fails_is_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(engine.tokens(TEXT[:9], GREEDY))
    answer = engine.tokens(TEXT[:9], GREEDY)
    assert [next(answer) for _ in range(3)] == wanted[:3]
    last: Any = engine.model.model.layers[-1]
    with monkeypatch.context() as patched:
        patched.setattr(last.dense, "compute", _fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            next(answer)
    assert list(engine.tokens(TEXT[:9], GREEDY)) == wanted
    assert engine.last_run()["reused_tokens"] == 0


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")
