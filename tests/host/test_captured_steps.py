"""Single tokens by captured pieces: with the recorder replaying nothing but aten calls, the step is the eager one."""

from __future__ import annotations

import gc
import logging
import math
import random
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.sdpa_attention import SdpaAttention
from hybrimoe_kt.core.timeline import Timeline
from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.adversary import Adversary
from hybrimoe_kt.device.emulated.faults import Faults
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.step_graph import listeners
from hybrimoe_kt.engine import room
from hybrimoe_kt.engine.captured_loop import CapturedLoop, captured_loop
from hybrimoe_kt.engine.growing_layers import GrowingLayer
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.host.rules.injection import packaged_rules
from hybrimoe_kt.operators.attention import DecodeAttention
from hybrimoe_kt.runtime import ModelExperts, Runtime, assemble
from tests.support.generated_model import GeneratedModel, Shape

from .test_equality import SHAPES

Make = Callable[[Shape], GeneratedModel]
PROMPT = random.Random(5).choices(range(250), k=11)
EXACT: dict[str, Any] = {
    "accelerator": "emulated", "cpu_backend": "torch_reference", "gpu_backend": "torch_reference",
    "cache_size": 0.5, "prefetch_size": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little that a few tokens fill it."""
    monkeypatch.setattr(room, "_LEAST_ROOM", 4)
    monkeypatch.setattr(room, "_LEAST_FIXED_ROOM", 20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(model: GeneratedModel, **options: Any) -> LoadedModel:
    own = {name: options.pop(name) for name in ("kv_cache_type", "assemble", "rules_path") if name in options}
    given = EXACT | options
    return load_model(model.path, device="emulated:0", option_overrides=given, progress=False, **own)


def generator(loaded: LoadedModel, *, captures: bool) -> TokenGenerator:
    """One whose single tokens are fixed steps, captured or not."""
    made = TokenGenerator(loaded, set(), captures=True)
    assert isinstance(made.loop, CapturedLoop)
    made.loop.captures = captures
    return made


def loop_of(made: TokenGenerator) -> CapturedLoop:
    assert isinstance(made.loop, CapturedLoop)
    return made.loop


def decode(made: TokenGenerator, num_tokens: int, prompt: list[int] = PROMPT) -> torch.Tensor:
    """Logits of the prompt's last token and of so many greedy ones, `[num_tokens + 1, vocab]`."""
    rows = [made.append(prompt).clone()]
    for _ in range(num_tokens):
        rows.append(made.append([int(rows[-1].argmax())]).clone())
    return torch.stack(rows)


def check(model: GeneratedModel, num_tokens: int, **options: Any) -> TokenGenerator:
    """Captured and eager fixed steps agree in every bit, and both with steps of Transformers' own cache."""
    wanted = decode(generator(load(model, **options), captures=False), num_tokens)
    made = generator(load(model, **options), captures=True)
    found = decode(made, num_tokens)
    assert torch.equal(found, wanted)
    assert wanted.std() > 0.3, "a model whose logits are all alike would prove nothing"
    usual = TokenGenerator(load(model, **options), set())
    assert usual.loop is None
    few = min(num_tokens, 12)
    torch.testing.assert_close(decode(usual, few), wanted[: few + 1], rtol=0, atol=1e-4)
    return made


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
    pieces = loop_of(made)._pieces
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
                pieces = loop_of(made)._pieces
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
            cached = made._reuse(text)
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

    def attend(self: SdpaAttention, query: torch.Tensor, keys: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (captured.append if listeners else warm.add)(keys.shape[2])
        assert warm.issuperset(captured)
        return attend_(self, query, keys, *args, **kwargs)

    attend_ = SdpaAttention.attend
    monkeypatch.setattr(SdpaAttention, "attend", attend)
    decode(generator(load(generated(SHAPES["qwen3moe"])), captures=True), 40)
    assert len(set(captured)) == 3


def on_adversary(seed: int, faults: Faults | None = None) -> Callable[[ModelExperts], Runtime]:
    def made(experts: ModelExperts) -> Runtime:
        accelerator = AdversarialAccelerator(Adversary(seed), faults=faults)
        return assemble(experts, accelerators={"emulated": accelerator})

    return made


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cache_size", [1, 0.5, "all"])
def test_in_whatever_order_a_device_works(generated: Make, seed: int, cache_size: Any) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model, cache_size=cache_size), captures=False), 16)
    loaded = load(model, cache_size=cache_size, prefetch_size=3, assemble=on_adversary(seed))
    assert torch.equal(decode(generator(loaded, captures=True), 16), wanted)
    adversary = loaded.runtime.accelerators[0].adversary  # type: ignore[attr-defined]
    assert not adversary.detector.races


@pytest.mark.parametrize("failure", ["raise", "late", "stall", "out_of_memory"])
@pytest.mark.parametrize(
    ("kind", "at"), [("copy", 50), ("copy", 60), ("copy", 97), ("copy", 130), ("launch", 40), ("launch", 75)]
)
def test_faults_change_nothing(generated: Make, kind: str, at: int, failure: Any) -> None:
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=False), 16)
    faults = Faults(kind, at, failure, times=2)
    loaded = load(model, deadline_s=0.3, assemble=on_adversary(1, faults))
    made = generator(loaded, captures=True)
    found = decode(made, 16)
    assert faults.site is not None, "it struck"
    if failure in ("late", "stall"):  # the host had gone on: everything was computed anew, as one prompt
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    else:
        assert torch.equal(found, wanted)


def test_slots_that_are_taken_away_between_two_tokens(generated: Make) -> None:
    """A whole layer is not whole any more, and a captured launch reads memory that is gone."""
    model = generated(SHAPES["qwen3moe"])
    wanted = decode(generator(load(model), captures=False), 16)
    for size in ("all", 0.5):
        made = generator(load(model, cache_size=size), captures=True)
        rows = decode(made, 8)
        assert made.runtime.make_room(torch.OutOfMemoryError("asked for"))
        more = decode(made, 7, [int(rows[-1].argmax())])
        assert torch.equal(torch.cat([rows, more]), wanted)


@pytest.mark.parametrize("through", ["prompt", "nothing"])
def test_experts_that_change_places_between_two_tokens(generated: Make, through: str) -> None:
    """As after a failure in a prompt: the layer is whole again, and the table of slots that was captured is not."""
    model = generated(SHAPES["qwen3moe"])
    later = PROMPT if through == "prompt" else [7]
    wanted = generator(load(model), captures=False)
    rows = torch.cat([decode(wanted, 8), decode(wanted, 8, later)])
    made = generator(load(model, cache_size="all"), captures=True)
    found = decode(made, 8)
    runtime = made.runtime
    lane, coordinator = runtime.lanes[0], runtime.coordinator
    layer = min(runtime.store.layers)
    a, b = coordinator.slots_of(layer)[0], coordinator.slots_of(layer)[1]
    for slot in (a, b):
        coordinator.drop(layer, slot)
    cache, memory = coordinator._layers[layer].cache, lane.pool.layers[layer].memory
    for expert, slot in ((0, b), (1, a)):
        cache.prepare(expert, slot, 0.0)
        cache.complete(expert)
    memory[[a, b]] = memory[[b, a]]
    assert torch.equal(torch.cat([found, decode(made, 8, later)]), rows)


@pytest.mark.parametrize("baked", ["position", "length"])
def test_a_number_that_python_worked_out_is_found(generated: Make, baked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorder is for: with such a mistake in the cache, tokens come out wrong, as they would on a GPU."""
    layer = GrowingLayer

    def update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fixed_length is None:
            return update_(self, key_states, value_states)
        for held, new in zip(self._rooms, (key_states, value_states), strict=True):
            if baked == "position":
                held[..., self.length : self.length + 1, :] = new
            else:
                held.index_copy_(2, self.position, new)
        end = self.length + 1 if baked == "length" else self.room
        return tuple(held[..., :end, :] for held in self._rooms)

    model = generated(SHAPES["mixtral"])
    wanted = decode(generator(load(model), captures=False), 6)
    update_ = layer.update
    monkeypatch.setattr(layer, "update", update)
    monkeypatch.setattr(CapturedLoop, "_mask", lambda self, cache: None if baked == "length" else MASK(self, cache))
    torch.testing.assert_close(decode(generator(load(model), captures=False), 6), wanted, rtol=0, atol=1e-4)
    found = decode(generator(load(model), captures=True), 6)
    assert (found[3:] - wanted[3:]).abs().max() > 0.01


MASK = CapturedLoop._mask


def test_a_step_that_reads_a_value_is_not_captured(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]))
    wanted = decode(generator(loaded, captures=False), 8)
    made = generator(loaded, captures=True)
    norm: Any = loaded.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, output: output * float((output[0, 0, 0] * 0 + 1).item()))
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(decode(made, 8), wanted, rtol=0, atol=1e-4)  # part of it as one prompt
    assert [record for record in caplog.records if "reads a value on the host" in record.message]
    assert not loop_of(made).captures and loop_of(made).num_captures == 0


def test_a_driver_that_refuses_to_capture(
    generated: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]))
    wanted = decode(generator(loaded, captures=False), 8)
    made, begin, calls = generator(loaded, captures=True), Recorder.begin, []

    def refuse(self: Recorder) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        begin(self)

    monkeypatch.setattr(Recorder, "begin", refuse)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(decode(made, 8), wanted, rtol=0, atol=1e-4)
    (warning,) = [record.message for record in caplog.records if "captured" in record.message]
    assert "operation not permitted" in warning and len(calls) == 2 and not loop_of(made).captures


def test_what_was_captured_is_let_go_of_at_once(generated: Make) -> None:
    """Not when Python next looks for cycles, perhaps within a capture: graphs and page-locked memory go with it."""
    made = generator(load(generated(SHAPES["qwen3moe"])), captures=True)
    decode(made, 8)
    pieces = loop_of(made)._pieces
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
    pieces = loop_of(made)._pieces
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
    pieces = loop_of(made)._pieces
    assert pieces is not None and pieces.num_pieces == 1, "and are passed over again"
    assert loaded.runtime.seconds.replay > 0


def test_an_error_in_a_captured_step_leaves_the_next_one_right(generated: Make) -> None:
    loaded = load(generated(SHAPES["qwen3moe"]))
    wanted = decode(generator(loaded, captures=False), 8)
    made = generator(loaded, captures=True)
    handle = loaded.model.model.layers[1].register_forward_pre_hook(_fail_second())
    with pytest.raises(ZeroDivisionError):
        decode(made, 8)
    handle.remove()
    made.reset()
    assert torch.equal(decode(made, 8), wanted)


@pytest.mark.parametrize("where", ["layers.0.self_attn", "layers.1.self_attn.v_proj"])
def test_a_prompt_that_breaks_leaves_nothing_in_memory(generated: Make, tmp_path: Path, where: str) -> None:
    """Nor layers of unequal room: Transformers' own attention is given all of it, behind a mask."""
    packaged = Path(packaged_rules("qwen3moe.yaml")).read_text()
    rules = tmp_path / "rules.yaml"
    rules.write_text(re.sub(r"- match:\n    name: \^model.*self_attn\$\n.*\n.*DecodeAttention\n", "", packaged))
    loaded = load(generated(SHAPES["qwen3moe"]), rules_path=rules)
    assert not any(isinstance(module, DecodeAttention) for module in loaded.model.modules())
    made = generator(loaded, captures=True)
    wanted = decode(made, 4)
    body: Any = loaded.model
    hook = body.model.get_submodule(where).register_forward_hook(lambda _, args, answer: _without_numbers(answer))
    with pytest.raises(KernelError, match="NaN"):
        made.append([3, *PROMPT, *PROMPT, 4])
    hook.remove()
    made.reset()
    assert torch.equal(decode(made, 4), wanted)


def _without_numbers(answer: Any) -> Any:
    return (answer[0] * math.nan, *answer[1:]) if isinstance(answer, tuple) else answer * math.nan


def _fail_second() -> Callable[..., None]:
    """Of the steps of one token: the first is an ordinary one, the second is captured."""
    calls: list[int] = []

    def hook(module: Any, args: Any) -> None:
        calls.append(args[0].shape[1])
        if calls.count(1) == 2:
            raise ZeroDivisionError

    return hook


def test_what_cannot_be_captured_says_why(generated: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = generated(SHAPES["qwen3moe"])
    on_cpu = load_model(model.path, option_overrides=EXACT, progress=False)
    made = TokenGenerator(on_cpu, set())
    on_cpu.dense = None
    with caplog.at_level(logging.WARNING):
        assert captured_loop(on_cpu, made._cache, captures=True) is None
    assert "layer 0 keeps keys and values in a StoredLayer" in caplog.text


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
