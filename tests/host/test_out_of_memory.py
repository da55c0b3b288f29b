"""The model's own work runs out of accelerator memory: expert caches make room, and the answer is the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine, Sampling
from hybrimoe_kt.engine.steps import model_steps
from hybrimoe_kt.errors import CapacityError
from hybrimoe_kt.operators.moe_block import MoEBlock
from tests.support.by_modules import by_modules
from tests.support.generated_model import GeneratedModel, Shape, Type

Make = Callable[[Shape], GeneratedModel]
GREEDY = Sampling(max_new_tokens=8, temperature=0)
PROMPT = [(13 * at + 2) % 250 for at in range(11)]
LATENT = Shape(architecture="deepseek2", layers=3)
HYBRID = Shape(architecture="qwen3next", head_dim=64, layers=4, dense_type=Type.Q8_0)


def build(generated: Make, shape: Shape = Shape(), **options: Any) -> Engine:  # noqa: B008
    overrides = {"cpu_backend": "torch_reference", "accelerator": "emulated", "cache_size": 4, "max_chunk_tokens": 4}
    made = build_engine(generated(shape).path, progress=False, option_overrides=overrides | options)
    made.end_ids = set()
    by_modules(made)
    return made


class Full:
    """Makes a module run out of memory at the given calls of it."""

    def __init__(self, module: torch.nn.Module, *calls: int, allocate: Callable[[], object] = lambda: None) -> None:
        self.calls, self.count, self.allocate = calls, 0, allocate
        module.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count in self.calls:
            _held = self.allocate()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 4")


def last_mixer(engine: Engine) -> torch.nn.Module:
    """Attention of the last layer: those before have been computed when it fails."""
    layer = engine.model.model.layers[-1]
    return getattr(layer, "self_attn", None) or layer.linear_attn


# 11 tokens are three chunks, then a step a token
@pytest.mark.parametrize("call", [1, 2, 3, 4, 9], ids=["first", "second chunk", "last chunk", "first token", "later"])
@pytest.mark.parametrize("shape", [Shape(), HYBRID], ids=["attention", "hybrid"])
def test_the_answer_is_the_same_and_the_cache_smaller(generated: Make, shape: Shape, call: int) -> None:
    wanted = list(build(generated, shape).tokens(PROMPT, GREEDY))
    engine = build(generated, shape)
    before = engine.runtime.num_slots
    full = Full(last_mixer(engine), call)
    assert list(engine.tokens(PROMPT, GREEDY)) == wanted
    assert full.count > call
    assert 0 < engine.runtime.num_slots < before
    (health,) = engine.runtime.health().accelerators.values()
    assert (health.shrunk, health.failed_steps, health.given_up) == (1, 0, False)
    assert health.last_failure == "CUDA out of memory. Tried to allocate 2.00 GiB"
    longer = [*PROMPT, *wanted, 9]
    found = list(engine.tokens(longer, GREEDY))
    assert engine.last_run()["reused_tokens"] >= len(PROMPT)  # what was computed again is the conversation
    engine.reset()
    assert list(engine.tokens(longer, GREEDY)) == found


@pytest.mark.parametrize("call", [1, 3, 5], ids=["first", "last chunk", "later"])
@pytest.mark.parametrize("shape", [LATENT, HYBRID], ids=["after", "before"])
def test_shared_experts_find_no_memory(generated: Make, shape: Shape, call: int) -> None:
    """They run while the routed ones are under way, whatever the order in the model's own block."""
    wanted = list(build(generated, shape).tokens(PROMPT, GREEDY))
    engine = build(generated, shape)
    block = engine.model.model.layers[-1].mlp
    assert isinstance(block, MoEBlock)
    full = Full(block.get_submodule("shared_experts" if shape is LATENT else "shared_expert"), call)
    assert list(engine.tokens(PROMPT, GREEDY)) == wanted
    assert full.count > call
    (health,) = engine.runtime.health().accelerators.values()
    assert (health.shrunk, health.failed_steps, health.given_up) == (1, 0, False)
    engine.runtime.coordinator.check_integrity()


@pytest.mark.parametrize("call", [1, 3], ids=["first", "last chunk"])
def test_a_prompts_log_probabilities_are_those_of_the_second_attempt(generated: Make, call: int) -> None:
    asked = Sampling(max_new_tokens=2, temperature=0, num_logprobs=1, num_prompt_logprobs=1)
    wanted = list(build(generated).generate(PROMPT, asked))
    engine = build(generated)
    full = Full(last_mixer(engine), call)
    found = list(engine.generate(PROMPT, asked))
    assert full.count > call
    assert [(one.token, one.place) for one in found] == [(one.token, one.place) for one in wanted]
    assert len(found) == len(PROMPT) + 2
    assert [one.logprob for one in found[1:]] == pytest.approx([one.logprob for one in wanted[1:]], abs=1e-4)


def test_a_conversation_that_is_continued(generated: Make) -> None:
    engine, other = build(generated), build(generated)
    first = list(engine.tokens(PROMPT, GREEDY))
    assert list(other.tokens(PROMPT, GREEDY)) == first
    longer = [*PROMPT, *first, 7, 8, 9]
    wanted = list(other.tokens(longer, GREEDY))
    Full(last_mixer(engine), 1)
    assert list(engine.tokens(longer, GREEDY)) == wanted


def test_given_text(generated: Make) -> None:
    """Recorded texts and perplexities go this way; a second failure while computing again is survived as well."""
    engine = build(generated)
    full = Full(last_mixer(engine), 3, 4)
    assert list(engine.feed(PROMPT, 4)) == [4, 4, 3]
    assert full.count == 3 + 1 + 3  # two chunks before the failure, one that fails at once, three from the start
    assert engine.conversation is not None and engine.conversation.ids == PROMPT
    assert next(iter(engine.runtime.health().accelerators.values())).shrunk == 2


def test_nothing_left_to_shrink_is_one_sentence_and_the_next_answer_works(generated: Make) -> None:
    engine = build(generated, cache_size=1)
    wanted = list(build(generated, cache_size=1).tokens(PROMPT, GREEDY))
    full = Full(last_mixer(engine), *range(3, 100))
    with pytest.raises(CapacityError, match=r"with 11 tokens \(CUDA out of memory. Tried .*\); shorten .*--cache_size"):
        list(engine.tokens(PROMPT, GREEDY))
    assert engine.runtime.num_slots == 0
    full.calls = ()
    assert list(engine.tokens(PROMPT, GREEDY)) == wanted


def test_without_an_accelerator(generated: Make) -> None:
    engine = build(generated, accelerator="none")
    Full(last_mixer(engine), 2)
    with pytest.raises(CapacityError, match="out of accelerator memory"):
        list(engine.tokens(PROMPT, GREEDY))
    assert len(list(engine.tokens(PROMPT, GREEDY))) == 8


def test_room_is_made_when_nothing_holds_the_failed_step(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its frames held is free before the allocator is asked to give back what it has."""
    engine = build(generated)
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def allocate() -> torch.Tensor:
        tensor = torch.empty(8)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(
        model_steps, "give_back_unused", lambda devices: alive.extend(ref() is not None for ref in held)
    )
    Full(last_mixer(engine), 2, allocate=allocate)
    gc.disable()
    try:
        list(engine.tokens(PROMPT, GREEDY))
    finally:
        gc.enable()
    assert alive == [False]


@pytest.mark.parametrize(
    ("text", "shrinks"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_libraries_that_find_no_memory(generated: Make, text: str, shrinks: bool) -> None:
    """They say so in other words; a device that is broken is none of this."""
    engine = build(generated)

    def fail(*_: Any) -> None:
        hook.remove()
        raise RuntimeError(text)

    hook = last_mixer(engine).register_forward_pre_hook(fail)
    if shrinks:
        assert len(list(engine.tokens(PROMPT, GREEDY))) == 8
    else:
        with pytest.raises(RuntimeError, match="illegal"):
            list(engine.tokens(PROMPT, GREEDY))
    assert next(iter(engine.runtime.health().accelerators.values())).shrunk == int(shrinks)


def test_a_recording_ends(generated: Make) -> None:
    engine = build(generated)
    engine.runtime.recorder = type("Silent", (), {"record": lambda *_: None})()
    Full(last_mixer(engine), 2)
    with pytest.raises(CapacityError, match="out of accelerator memory"):
        list(engine.feed(PROMPT, 4))
