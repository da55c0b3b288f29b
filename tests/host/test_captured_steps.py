"""Single tokens by captured pieces: with the recorder replaying nothing but aten calls, the step is the eager one."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.attention_protocol import Asked
from hybrimoe_kt.backends.sdpa_attention import SdpaAttention
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.step_graph import listeners
from hybrimoe_kt.engine.memory import room
from hybrimoe_kt.engine.steps.captured_loop import CapturedLoop
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.host.hf.loading import load_model
from tests.support.captured_steps import EXACT, PROMPT, Make, check, decode, generator, load, loop_of

from .test_equality import SHAPES

pytestmark = pytest.mark.usefixtures("little_room", "one_thread")


@pytest.mark.parametrize("name", SHAPES)
def test_replayed_steps_are_the_eager_ones(generated: Make, name: str) -> None:
    """Across two growths of the cache, prefetching."""
    loop = loop_of(check(generated(SHAPES[name]), 40))
    assert loop.num_captures == 3, "at the beginning, and after each growth"


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_replayed_steps_are_the_eager_ones_for_long(generated: Make, name: str) -> None:
    loop = loop_of(check(generated(SHAPES[name]), 300))
    assert 5 <= loop.num_captures <= 8


def test_routing_that_is_seen_by_its_number(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hardware, where a piece goes on after it has sent."""
    monkeypatch.setattr(Recorder, "host_sees_writes", True)
    check(generated(SHAPES["qwen3moe"]), 24)


@pytest.mark.parametrize("kept", ["f16", "q8_0"])
def test_other_types_of_keys_and_values(generated: Make, kept: str) -> None:
    check(generated(SHAPES["qwen3moe"]), 24, kv_cache_type=kept)


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2"])
@pytest.mark.parametrize("depth", [0, 2])
def test_a_token_is_one_replay_where_all_experts_are_resident(generated: Make, name: str, depth: int) -> None:
    made = check(generated(SHAPES[name]), 24, cache_size="all", prefetch_size=depth)
    pieces = loop_of(made).captured.pieces
    assert pieces is not None and pieces.num_pieces == 1
    counted = made.runtime.statistics()
    layers = len(made.runtime.layer_specs())
    top_k = next(iter(made.runtime.store.layers.values())).top_k
    assert counted["hits"] >= 25 * layers * top_k and counted["misses"] == 0


def test_layers_that_are_whole_again_end_no_piece(generated: Make) -> None:
    """After the fallback has tried the CPU alone, say."""
    model, answers = generated(SHAPES["qwen3moe"]), []
    for captures in (False, True):
        made = generator(load(model, cache_size="all"), captures=captures)
        answers.append([decode(made, 4)])
        for scheduler in ("cpu_only", None):
            made.runtime.coordinator.use(scheduler)
            answers[-1].append(decode(made, 4, [7]))
            if captures:
                pieces = loop_of(made).captured.pieces
                assert pieces is not None and pieces.num_pieces == (1 if scheduler is None else 3)
    assert torch.equal(*map(torch.cat, answers))


def test_a_layer_is_one_replay(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_LEAST_ROOM", 64)
    loaded = load(generated(SHAPES["qwen3moe"]))
    made = generator(loaded, captures=True)
    decode(made, 3)
    accelerator = loaded.runtime.accelerators[0]
    calls: list[object] = []
    replay = accelerator.replay
    monkeypatch.setattr(accelerator, "replay", lambda graph, **k: (calls.append(graph), replay(graph, **k)))
    asked: list[object] = []
    loaded.model.model.layers[0].register_forward_hook(lambda *_: asked.append(1))
    decode(made, 2, [5])
    assert len(calls) == 3 * (len(loaded.model.model.layers) + 1) and not asked


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek3", "qwen3next"])
def test_a_prefix_is_reused_and_a_conversation_follows_another(
    generated: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_LEAST_ROOM", 64)
    texts = [PROMPT, [*PROMPT[:7], 3, 4], [9, 8, 7]]
    model, answers = generated(SHAPES[name]), []
    for captures in (False, True):
        made = generator(load(model), captures=captures)
        answers.append([])
        for text in texts:
            cached = made.go_on_from(text)
            answers[-1].append(decode(made, 6, text[cached:]))
        if captures:
            assert loop_of(made).num_captures == 1, "the same memory serves them all"
    for wanted, found in zip(*answers, strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize(("name", "kept"), [("qwen3moe", "f32"), ("qwen3moe", "q8_0"), ("deepseek3", "f32")])
def test_a_prompt_that_moves_the_cache(generated: Make, name: str, kept: str) -> None:
    """Chat's second message needs more room than there was: what was captured reads memory that is gone."""
    model, answers, later = generated(SHAPES[name]), [], random.Random(1).choices(range(250), k=40)
    for captures in (False, True):
        made = generator(load(model, kv_cache_type=kept), captures=captures)
        answers.append(torch.cat([decode(made, 6), decode(made, 6, later)]))
        if captures:
            assert loop_of(made).num_captures >= 2, "before the second prompt and after it"
    assert torch.equal(*answers)


def test_rooms_of_a_new_size_are_first_asked_for_in_a_step_that_is_not_captured(
    generated: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention may have to plan for them, or to build and load a kernel, which no capture allows."""
    warm: set[int] = set()
    captured: list[int] = []

    def attend(self: SdpaAttention, asked: Asked) -> torch.Tensor:
        (captured.append if listeners else warm.add)(asked.keys.shape[2])
        assert warm.issuperset(captured)
        return attend_(self, asked)

    attend_ = SdpaAttention.attend
    monkeypatch.setattr(SdpaAttention, "attend", attend)
    decode(generator(load(generated(SHAPES["qwen3moe"])), captures=True), 40)
    assert len(set(captured)) == 3


def test_what_was_captured_is_let_go_of_at_once(generated: Make) -> None:
    """Not when Python next looks for cycles, perhaps within a capture: graphs and page-locked memory go with it."""
    made = generator(load(generated(SHAPES["qwen3moe"])), captures=True)
    decode(made, 8)
    pieces = loop_of(made).captured.pieces
    assert pieces is not None
    held = [weakref.ref(sent) for sent in pieces._sent.values()]
    pieces = None
    gc.disable()
    try:
        loop_of(made).forget()
        assert held and not any(sent() for sent in held)
    finally:
        gc.enable()


def test_a_timeline_shows_replays_and_waits(generated: Make) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]), cache_size="all")
    made = generator(loaded, captures=True)
    rows = decode(made, 3)
    pieces = loop_of(made).captured.pieces
    assert pieces is not None and pieces.num_pieces == 1
    loaded.runtime.record_timeline(Timeline())
    decode(made, 4, [int(rows[-1].argmax())])
    timeline = loaded.runtime.finish_timeline()
    assert timeline is not None
    found = Counter((span.work, span.layer) for span in timeline.spans if span.kind == "scheduler")
    layers = list(loaded.runtime.store.layers)
    replays = found["replay", -1]
    assert replays >= 2 and {layer: found["replay", layer] for layer in layers} == dict.fromkeys(layers, replays)
    assert all(found["wait for routing", layer] >= replays for layer in layers), (
        "whole layers are read while it records"
    )
    decode(made, 3, [5])
    pieces = loop_of(made).captured.pieces
    assert pieces is not None and pieces.num_pieces == 1, "and are passed over again"
    assert loaded.runtime.seconds.replay > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")
@pytest.mark.parametrize("gpu_backend", ["triton", "torch"])
@pytest.mark.parametrize("cache_size", [1, 0.5, "all"])
@pytest.mark.parametrize("name", ["qwen3moe", "deepseek3", "qwen3next"])
def test_graphs_of_a_device(generated: Make, name: str, cache_size: Any, gpu_backend: str) -> None:
    """Tokens and logits of replayed graphs beside those of the same steps asked of the modules, growths included."""
    options = {"accelerator": "cuda", "gpu_backend": gpu_backend, "cache_size": cache_size}
    answers = []
    for captures in (False, True):
        loaded = load_model(
            generated(SHAPES[name]).path, device="cuda:0", dtype=torch.bfloat16, option_overrides=EXACT | options,
            progress=False,
        )  # fmt: skip
        made = TokenGenerator(loaded, set(), captures=captures)
        assert isinstance(made.loop, CapturedLoop)
        answers.append(decode(made, 40))
        assert made.runtime.health().is_clean, "the CPU answered in the accelerator's place"
        if captures:
            assert made.loop.captures and made.loop.num_captures == 3, "it did not give up"
    spread = answers[0].std()
    assert (answers[1] - answers[0]).abs().max() <= 0.05 * spread
