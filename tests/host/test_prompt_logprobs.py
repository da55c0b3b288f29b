"""Log-probabilities of a prompt's own tokens against stock Transformers, and what follows the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine
from hybrimoe_kt.engine.sampling import Sampling
from hybrimoe_kt.engine.steps import prompt_scores
from hybrimoe_kt.engine.steps.prompt_scores import PromptScores
from hybrimoe_kt.errors import KernelError
from tests.support.generated_model import Shape

from .stock import logits_of, stock_model

PROMPT = [int(token) for token in torch.randint(0, 250, (37,), generator=torch.Generator().manual_seed(5))]


def scored(engine: Engine, **options: Any) -> list[Any]:
    sampling = Sampling(temperature=0, num_logprobs=2, num_prompt_logprobs=2, **options)
    return list(engine.generate(PROMPT, sampling))


@pytest.mark.parametrize("architecture", ["qwen3moe", "qwen3next", "granitemoe"])
@pytest.mark.parametrize("chunk", [512, 7])
def test_they_are_those_of_a_stock_forward_pass(generated: Callable[..., Any], architecture: str, chunk: int) -> None:
    model = generated(Shape(architecture=architecture, head_dim=64, layers=4))
    overrides = {"accelerator": "none", "max_chunk_tokens": chunk, "cpu_backend": "torch_reference"}
    engine = build_engine(model.path, dtype="float32", progress=False, option_overrides=overrides)
    wanted = logits_of(stock_model(model), PROMPT).float().log_softmax(-1)
    engine.complete(PROMPT[:20], sampling=Sampling(max_new_tokens=1))  # a cached beginning, which must not be skipped
    told = scored(engine, max_new_tokens=3)
    prompt, answer = told[: len(PROMPT)], told[len(PROMPT) :]
    assert [one.token for one in prompt] == PROMPT
    assert prompt[0].logprob is None
    assert {one.place for one in prompt} == {"prompt"}
    own = [float(wanted[at - 1, token]) for at, token in enumerate(PROMPT) if at]
    assert [one.logprob for one in prompt[1:]] == pytest.approx(own, abs=2e-3)
    for at, one in enumerate(prompt[1:]):
        values = [logprob for _, logprob in one.likeliest]
        assert values == pytest.approx(wanted[at].topk(2).values.tolist(), abs=2e-3)
    assert engine.last_run()["reused_tokens"] == 0
    plain = list(engine.tokens(PROMPT, Sampling(temperature=0, max_new_tokens=3)))
    assert [one.token for one in answer if one.place == "answer"] == plain


def test_nothing_may_be_asked_for_but_the_prompt(generated: Callable[..., Any]) -> None:
    engine = build_engine(generated(Shape()).path, progress=False, option_overrides={"accelerator": "none"})
    assert len(scored(engine, max_new_tokens=0)) == len(PROMPT)
    assert engine.last_run()["finish"] == "length"
    assert engine.last_run()["new_tokens"] == 0
    assert list(engine.tokens(PROMPT, Sampling(max_new_tokens=0))) == []
    answer = engine.complete(PROMPT, sampling=Sampling(max_new_tokens=0, num_prompt_logprobs=0))
    assert [one.token for one in answer.prompt_sampled] == PROMPT
    assert answer.text == ""
    engine.end_ids = set(range(engine.vocabulary.size))
    ended = scored(engine, max_new_tokens=4)
    assert [one.place for one in ended] == ["prompt"] * len(PROMPT) + ["end"]
    assert list(engine.tokens(PROMPT, Sampling(max_new_tokens=4))) == []


def test_an_end_that_is_ignored_is_never_drawn(generated: Callable[..., Any]) -> None:
    engine = build_engine(generated(Shape()).path, progress=False, option_overrides={"accelerator": "none"})
    greedy = {"temperature": 0, "max_new_tokens": 5}
    first = next(engine.tokens(PROMPT, Sampling(**greedy)))
    engine.end_ids = {first}
    assert list(engine.tokens(PROMPT, Sampling(**greedy))) == []
    answer = list(engine.tokens(PROMPT, Sampling(**greedy, ignore_end=True)))
    assert len(answer) == 5
    assert first not in answer


def test_large_vocabularies_come_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_scores, "_MAX_LOGITS", 100)
    assert PromptScores.max_tokens(30) == 3
    assert PromptScores.max_tokens(1000) == 1
    scores = PromptScores([1, 2, 3], 0)
    with pytest.raises(KernelError, match="NaN"):
        scores.add(torch.full((3, 5), float("nan")))
    scores.clear()
    scores.add(torch.zeros(2, 5, dtype=torch.bfloat16))
    scores.add(torch.zeros(1, 5))
    assert [one.logprob for one in scores.sampled()[1:]] == pytest.approx([-1.609438] * 2)
