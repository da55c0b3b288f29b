"""A card is planned before weights are read, from what the rules made of the model; what does not fit is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hybrimoe_kt.backends.flashinfer_attention import FlashInferAttention
from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.core.memory_plan import CONTEXT_BYTES, LIBRARY_BYTES
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.lane_memory import lane_bytes
from hybrimoe_kt.device.layout import MatrixLayout
from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.engine.memory.growing_cache import growing_cache, layer_bytes
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import CapacityError
from hybrimoe_kt.host.card_plan import DenseTensor, dense_bytes, kept_of, step_shape
from hybrimoe_kt.host.hf import loading
from hybrimoe_kt.host.hf.architectures import ARCHITECTURES
from hybrimoe_kt.host.hf.card_plans import Card, Context, dense_tensors
from hybrimoe_kt.host.hf.loading import load_model, plan_of
from hybrimoe_kt.host.hf.placement import Placement
from tests.support.generated_model import GeneratedModel, Shape, Type

from .test_equality import SHAPES

Make = Callable[[Shape], GeneratedModel]

Q4_K, Q6_K, BF16 = 12, 14, 30
DEEPSEEK = ARCHITECTURES["deepseek2"]
CARD = CONTEXT_BYTES + LIBRARY_BYTES
BASE = {"accelerator": "emulated", "cpu_backend": "torch_reference", "reserve_bytes": 0, "max_chunk_tokens": 16}


def test_dense_matrices_of_a_group_and_type_lie_as_one() -> None:
    """Planes of Q6_K begin at multiples of 128 bytes; floats take what torch's allocator gives."""
    qkv = [DenseTensor(name, Q4_K, 3, 256, "cuda", "attn") for name in "qk"]
    qkv += [DenseTensor("v", Q6_K, 3, 256, "cuda", "attn"), DenseTensor("elsewhere", Q4_K, 3, 256, "cpu")]
    floats = [DenseTensor("norm", BF16, 1, 300, "cuda", is_packed=False)]
    assert dense_bytes([*qkv, *floats], "cuda") == (6 * 144 + 32 + 384 + 256 + 128 + 128, 1024)
    assert dense_bytes(qkv, "cpu") == (512, 0)


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_keeps_what_was_planned(generated: Make, name: str) -> None:
    """Measured on the modules' own caches, after a prompt and a token."""
    loaded = load_model(generated(SHAPES[name]).path, option_overrides={"accelerator": "none"}, progress=False)
    cache, config = growing_cache(loaded.model.config, most_tokens=20), loaded.model.config
    for layer in loaded.model.model.layers:  # by the modules, as on a GPU
        object.__setattr__(layer, "_dense", None)
    kept = "cache" if "cache" in loaded.model.forward.__code__.co_varnames else "past_key_values"
    with torch.inference_mode():
        for piece in ([[1, 2, 3] * 6], [[4]]):
            loaded.model(input_ids=torch.tensor(piece), use_cache=True, **{kept: cache})
    assert isinstance(cache, DynamicCache)
    for layer, planned in zip(cache.layers, kept_of(config, 4), strict=True):
        assert layer_bytes(layer) == 20 * 4 * (planned.keys + planned.values) + planned.state_bytes


def test_widths_of_a_step() -> None:
    from transformers import AutoConfig

    latent = AutoConfig.for_model(
        "deepseek_v3", hidden_size=7168, num_attention_heads=128, kv_lora_rank=512, q_lora_rank=1536,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=1000, intermediate_size=18432,
    )  # fmt: skip
    shape = step_shape(latent, 512, 2)
    assert (shape.scores, shape.repeated, shape.feed_forward) == (128, 0, 18432)
    assert shape.projected == 128 * (192 + 128 + 2 * 512) + 576
    grouped = AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=1000
    )
    shape = step_shape(grouped, 512, 2, converts_cache=True)
    assert (shape.scores, shape.repeated, shape.handed_out) == (0, 2 * 32 * 128, 2 * 4 * 128)
    assert shape.projected == 2 * 32 * 128 + 2 * 4 * 128


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What emulated accelerators are asked for, from now on."""
    asked: list[int] = []
    allocate = ImmediateAccelerator.allocate

    def counting(self: ImmediateAccelerator, num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return allocate(self, num_bytes)

    monkeypatch.setattr(ImmediateAccelerator, "allocate", counting)
    monkeypatch.setattr(ImmediateAccelerator, "page_locked", allocate)
    return asked


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2"])
def test_a_lane_takes_what_was_planned(generated: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = counted(monkeypatch)
    loaded = load_model(generated(SHAPES[name]).path, option_overrides=BASE | {"cache_size": 2}, progress=False)
    slots = loaded.plans["emulated"].slots_bytes
    planned = lane_bytes(
        loaded.runtime.store.layers.values(), 16, gpu_answers_pairs=True, cpu_answers_pairs=True
    )  # fmt: skip
    assert slots == loaded.runtime._assembly.executor.lanes[0].pool.num_bytes
    assert 0.5 * planned <= sum(asked) - slots <= planned


def test_the_cache_takes_what_the_plan_leaves(generated: Make) -> None:
    model = generated(Shape())

    def slots(card_bytes: int, **options: Any) -> tuple[int, int]:
        given = BASE | {"card_bytes": card_bytes, **options}
        loaded = load_model(model.path, option_overrides=given, progress=False, context_tokens=64)
        plan = loaded.plans["emulated"]
        assert plan.card_bytes == card_bytes and plan.fits and plan.context_tokens == 64
        lane = loaded.runtime._assembly.executor.lanes[0]
        assert lane.pool.num_slots == sum(plan.slots.values()) and plan.slots_bytes <= plan.left_bytes
        return plan.slots_per_layer, plan.needs.num_bytes(64)

    most, used = slots(CARD + 2**30)
    plan = load_model(model.path, option_overrides=BASE, progress=False).plans["emulated"]
    one_each = sum(plan.needs.slot_bytes.values())
    assert most == Shape().experts
    assert slots(used + 2 * one_each)[0] == 2
    assert slots(used + 3 * one_each - 1)[0] == 2
    assert slots(used + 3 * one_each - 1, reserve_bytes=one_each)[0] == 1


def test_what_does_not_fit_is_refused_before_weights_are_read(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_build", lambda *_: pytest.fail("weights are read"))
    path = generated(Shape(context=4096)).path
    with pytest.raises(CapacityError, match=r"the dense weights take .* MiB, emulated has 100\.0 KiB,.* larger"):
        load_model(path, option_overrides=BASE | {"card_bytes": "100KiB"}, progress=False)
    with pytest.raises(CapacityError, match=r"beside dense weights .* and a context of 256 tokens take 25"):
        load_model(path, option_overrides=BASE | {"card_bytes": CARD}, progress=False)
    options = BASE | {"card_bytes": CARD + 6 * 2**20}
    with pytest.raises(CapacityError, match=r"a context of 4000 .* the largest that fits is (\d+) tokens") as said:
        load_model(path, option_overrides=options, context_tokens=4000, progress=False)
    largest = int(str(said.value).split()[-2])
    monkeypatch.undo()
    loaded = load_model(path, option_overrides=options, context_tokens=largest, progress=False)
    assert loaded.plans["emulated"].context_tokens == largest
    assert load_model(path, option_overrides=options, progress=False).plans["emulated"].context_tokens == largest


def test_a_card_without_experts_is_planned_too(generated: Make) -> None:
    """Experts may all be the CPU's, and the first layers of some families have none."""
    path, options = generated(Shape(dense_type=Type.Q8_0)).path, BASE | {"accelerator": "none"}
    ours = load_model(path, device="emulated:0", option_overrides=options, context_tokens=300, progress=False)
    plan = ours.plans["emulated:0"]
    assert plan.needs.packed_bytes and plan.needs.cache_bytes(300) and not plan.slots
    with pytest.raises(CapacityError, match=r"emulated:0 has 100\.0 MiB"):
        load_model(path, device="emulated:0", option_overrides=options | {"card_bytes": "100MiB"}, progress=False)
    assert not load_model(path, option_overrides=options, progress=False).plans


def test_types_of_the_cache_count(generated: Make) -> None:
    plans = {
        name: load_model(
            generated(Shape(head_dim=64)).path, option_overrides=BASE, progress=False, kv_cache_type=name
        ).plans["emulated"]
        for name in ("f32", "q8_0")
    }  # fmt: skip
    tokens = plans["f32"].context_tokens
    assert plans["q8_0"].needs.cache_bytes(tokens) * 128 == plans["f32"].needs.cache_bytes(tokens) * 34
    assert plans["q8_0"].needs.step is not None and plans["q8_0"].needs.step.handed_out


@pytest.mark.parametrize(("name", "takes"), [("qwen3moe", True), ("deepseek2", False)])
def test_attentions_workspace_counts(generated: Make, monkeypatch: pytest.MonkeyPatch, name: str, takes: bool) -> None:
    """FlashInfer's, where it has kernels for the model's heads: not for these latents."""
    shape = dataclasses.replace(SHAPES[name], head_dim=64)
    card = Card("cuda:0", torch.device("cuda:0"), 2**40, TritonGpu)
    context = Context(300, "auto", torch.bfloat16)

    def planned() -> int:
        return plan_of(generated(shape).path, None, card, context, {}).needs.kernel_bytes

    monkeypatch.setattr(FlashInferAttention, "unusable", staticmethod(lambda device: "it is not installed"))
    without = planned()
    monkeypatch.setattr(FlashInferAttention, "unusable", staticmethod(lambda device: None))
    assert planned() - without == (FlashInferAttention.num_bytes if takes else 0)


def test_a_cache_has_memory_for_what_was_planned_and_no_more(generated: Make) -> None:
    """Also where the conversation may grow longer than that."""
    given = BASE | {"card_bytes": CARD + 6 * 2**20}
    loaded = load_model(generated(Shape(context=4096)).path, option_overrides=given, progress=False)
    planned = loaded.plans["emulated"].context_tokens
    engine = TokenGenerator(loaded, set())
    assert 256 < planned < engine.context_tokens
    for layer in loaded.model.model.layers:  # by the modules, as on a GPU
        object.__setattr__(layer, "_dense", None)
    cache, new = engine.new_cache(), torch.zeros(1, Shape().kv_heads, planned - 10, Shape().head_dim)
    cache.update(new, new, 0)
    (kept,) = {each.keys + each.values for each in kept_of(loaded.model.config, 4)}
    assert layer_bytes(cache.layers[0]) == planned * kept * 4


def test_an_embedding_that_is_only_looked_up_takes_nothing_of_a_card(generated: Make, embedded_model: Path) -> None:
    """A head that is the embedding does."""
    for path, is_tied in ((generated(Shape(dense_type=Type.Q8_0)).path, False), (embedded_model, True)):
        loaded = load_model(path, option_overrides=BASE, progress=False)
        packed = loaded.loader.packed
        assert ("output.weight" not in packed) == is_tied
        on_card = [m for name, m in packed.items() if is_tied or name != "token_embd.weight"]
        sizes = [MatrixLayout.at(0, m.ggml_type, m.rows, m.columns).end_bytes for m in on_card]
        assert loaded.plans["emulated"].needs.packed_bytes == sum(sizes)


def test_one_tensor_of_up_projections_is_half_floats() -> None:
    """Latent attention multiplies by the half for keys transposed."""
    matrix = PackedMatrix("blk.0.attn_kv_b.weight", torch.empty(0), Q4_K, 4 * (32 + 16), 256)
    config = SimpleNamespace(num_attention_heads=4, qk_nope_head_dim=32)
    placement = Placement({"model.layers.0": "cuda:1"}, "cuda:0")
    found = dense_tensors(
        {matrix.name: matrix}, {"model.norm.weight": (64,)}, placement, DEEPSEEK, config, torch.bfloat16
    )  # fmt: skip
    assert list(found) == [
        DenseTensor(f"{matrix.name} (keys)", BF16, 4 * 32, 256, "cuda:1", is_packed=False),
        DenseTensor(matrix.name, Q4_K, 4 * 16, 256, "cuda:1"),
        DenseTensor("model.norm.weight", BF16, 1, 64, "cuda:0", is_packed=False),
    ]


def test_cards_hold_what_stands_on_them() -> None:
    """Of a real one the context is there before it is asked what is free; an emulated one stands for the CPU's."""
    real = Card("cuda:1", torch.device("cuda:1"), 10**9, TritonGpu)
    emulated = Card("emulated", torch.device("cpu"), 10**9, TritonGpu)
    whole, split = Placement({}, "cpu"), Placement({"a": "emulated:0", "b": "emulated:1"}, "cpu")
    places = ("cuda:1", "cuda:0", "cpu", "emulated", "emulated:1", "host")
    assert [place for place in places if real.holds(place, whole)] == ["cuda:1"]
    assert [place for place in places if emulated.holds(place, whole)] == ["cpu", "emulated"]
    assert not emulated.holds("cpu", split)
    assert real.size(0) == (10**9, 0, LIBRARY_BYTES) and emulated.size(0) == (10**9, 0, 0)
    assert real.size(2**40) == (10**9 + CONTEXT_BYTES, CONTEXT_BYTES, LIBRARY_BYTES)
    assert real.size(10**9) == emulated.size(10**9) == (10**9, CONTEXT_BYTES, LIBRARY_BYTES)
