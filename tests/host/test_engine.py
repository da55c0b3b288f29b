"""Conversations: the reused prefix changes nothing, stopping and failing leave the engine usable."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.errors import CapacityError, ModelError, RuleError
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.host.rules.rule_file import packaged_rules
from hybrimoe_kt.runtime import Job, Routed
from tests.support.generated_model import GeneratedModel, Shape

Make = Callable[[Shape], GeneratedModel]
GREEDY = Sampling(max_new_tokens=10, temperature=0)


@pytest.fixture
def engine(generated: Make) -> Engine:
    made = build_engine(generated(Shape()).path, progress=False, option_overrides={"cpu_backend": "torch_reference"})
    made.end_ids = set()
    return made


def test_attention_is_not_cudnns(generated: Make) -> None:
    """It would build a plan for every length of the keys, which is every token."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    build_engine(generated(Shape()).path, progress=False, option_overrides={"cpu_backend": "torch_reference"})
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def fresh(engine: Engine, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    engine.reset()
    return list(engine.tokens(prompt, sampling))


@pytest.mark.parametrize("shared", [0, 1, 9, 19, 20])
def test_a_reused_prefix_changes_nothing(engine: Engine, shared: int) -> None:
    first = [(7 * at) % 250 for at in range(20)]
    second = first[:shared] + [(11 * at + 3) % 250 for at in range(12)]
    wanted = fresh(engine, second)
    fresh(engine, first)
    assert list(engine.tokens(second, GREEDY)) == wanted
    assert engine.last_run()["reused_tokens"] == shared


def test_the_same_prompt_again_and_a_growing_conversation(engine: Engine) -> None:
    prompt = [5, 6, 7, 8]
    wanted = fresh(engine, prompt)
    assert list(engine.tokens(prompt, GREEDY)) == wanted
    assert engine.last_run()["reused_tokens"] == 3
    longer = [*prompt, *wanted, 9, 10]
    expected = fresh(engine, longer)
    fresh(engine, prompt)
    assert list(engine.tokens(longer, GREEDY)) == expected
    assert engine.last_run()["reused_tokens"] >= len(prompt)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_prompt_chunks_change_nothing(generated: Make, engine: Engine, chunk: int) -> None:
    overrides = {"cpu_backend": "torch_reference", "max_chunk_tokens": chunk}
    pieces = build_engine(generated(Shape()).path, progress=False, option_overrides=overrides)
    pieces.end_ids = set()
    prompt = [(13 * at + 2) % 250 for at in range(29)]
    assert list(pieces.tokens(prompt, GREEDY)) == fresh(engine, prompt)


def test_stopping_and_abandoning_leave_the_engine_usable(engine: Engine) -> None:
    prompt = [1, 2, 3]
    wanted = fresh(engine, prompt)
    stop = threading.Event()
    some = []
    for token in engine.tokens(prompt, GREEDY, stop):
        some.append(token)
        if len(some) == 4:
            stop.set()
    assert some == wanted[:4]
    assert engine.last_run()["finish"] == "cancelled"
    abandoned = engine.tokens(prompt, GREEDY)
    next(abandoned)
    abandoned.close()
    assert list(engine.tokens(prompt, GREEDY)) == wanted


def test_a_prompt_is_given_up_between_two_chunks(
    generated: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = {"cpu_backend": "torch_reference", "max_chunk_tokens": 4}
    chunks = build_engine(generated(Shape()).path, progress=False, option_overrides=overrides)
    chunks.end_ids = set()
    stop = threading.Event()
    chunk_sizes: list[int] = []
    begin = chunks.runtime.begin

    def and_stop(layer: int, routed: Routed) -> Job:
        chunk_sizes.append(len(routed.hidden))
        stop.set()
        return begin(layer, routed)

    prompt = [(7 * at) % 250 for at in range(30)]
    with monkeypatch.context() as patch:
        patch.setattr(chunks.runtime, "begin", and_stop)
        assert list(chunks.tokens(prompt, GREEDY, stop)) == []
    assert chunks.last_run()["finish"] == "cancelled"
    assert chunk_sizes == [4] * len(chunks.runtime.store.layers)
    assert list(chunks.tokens(prompt, GREEDY)) == fresh(engine, prompt)
    assert chunks.last_run()["reused_tokens"] == 4


def test_a_failure_in_the_middle_of_a_prompt_forgets_the_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [4, 5, 6, 7, 8]
    wanted = fresh(engine, prompt)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runtime, "begin", _fail)
        with pytest.raises(RuntimeError, match="injected"):
            list(engine.tokens([*prompt, 9], GREEDY))
    assert list(engine.tokens(prompt, GREEDY)) == wanted


def _fail(*_: object) -> None:
    raise RuntimeError("injected")


def test_the_context_is_a_limit(generated: Make) -> None:
    overrides = {"cpu_backend": "torch_reference"}
    small = build_engine(generated(Shape()).path, progress=False, context_tokens=16, option_overrides=overrides)
    small.end_ids = set()
    assert len(list(small.tokens([1] * 10, Sampling(max_new_tokens=100, temperature=0)))) == 6
    assert small.last_run()["finish"] == "length"
    for length in (16, 17):
        with pytest.raises(CapacityError, match="the context holds 16"):
            list(small.tokens([1] * length, GREEDY))
    with pytest.raises(CapacityError, match="empty"):
        list(small.tokens([], GREEDY))
    with pytest.raises(ModelError, match="token 9999"):
        list(small.tokens([1, 9999], GREEDY))


def test_messages_may_be_forgotten_and_begun_anew(tiny_model: Path) -> None:
    """What the chat's /reset does: another conversation that shares no more than the template's first token."""
    engine = build_engine(tiny_model, progress=False)
    for texts in (["Hello there."], ["Good morning."], ["Good morning.", "Fine.", "And you?"], ["Hello there."]):
        roles = ["user", "assistant", "user"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        answer = "".join(engine.stream(messages, sampling=Sampling(max_new_tokens=6, temperature=0)))
        assert answer.strip()
    assert engine.last_run()["reused_tokens"] >= 1


@pytest.mark.parametrize("temperature", [1e-39, 1e-7, 0.0])
def test_a_vanishing_temperature_is_greedy(engine: Engine, temperature: float) -> None:
    assert fresh(engine, [1, 2, 3], Sampling(max_new_tokens=10, temperature=temperature)) == fresh(engine, [1, 2, 3])


def test_a_packaged_rule_file_by_name(tiny_model: Path) -> None:
    loaded = load_model(tiny_model, rules_path="qwen3moe", progress=False)
    assert loaded.rules_file == packaged_rules("qwen3moe")
    with pytest.raises(RuleError, match="qwen3mo: the rule file does not exist"):
        load_model(tiny_model, rules_path="qwen3mo", progress=False)
