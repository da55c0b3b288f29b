"""Dense weights that stay packed on an accelerator: the same model as dequantised, and nothing held twice."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import torch

from hybrimoe_kt import optimize_rules
from hybrimoe_kt.backends import gpu_dense
from hybrimoe_kt.engine.memory.growing_cache import layer_bytes
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.injector import Injector
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.host.rules.injection import packaged_rules
from hybrimoe_kt.operators.attention_mla import AbsorbedMLA
from hybrimoe_kt.operators.embedding import QuantizedEmbedding
from hybrimoe_kt.operators.linear import QuantizedLinear
from tests.kernels.layers import DEVICE
from tests.support.generated_model import Shape, Type
from tests.support.rewritten import rewritten

from .stock import logits_of
from .test_equality import PROMPT, SHAPES
from .test_packed_weights import FLOAT, Make, only_experts, packed_file, without_choice

__all__ = ["only_experts"]  # a fixture

EXACT = {"accelerator": "emulated", "cpu_backend": "torch_reference", "cache_size": "all"}
COUNTS = {
    "qwen3moe": 2 * 2 + 1,  # q, k, v in one, and o, a layer; the head
    "qwen3next": 4 * (2 + 2) + 1,  # and of shared experts gate and up in one, and down
    "qwen35moe": 4 * (2 + 2) + 1,
    "deepseek2": 3 * (2 + 2) + 1,
    "deepseek3": 3 * (3 + 2) + 1,  # q_a and kv_a in one, q_b, o
}


def load(path: Path, device: str = "emulated:0", **options: object) -> LoadedModel:
    return load_model(path, device=device, option_overrides=EXACT, progress=False, **options)  # type: ignore[arg-type]


def count_products(model: LoadedModel) -> list[int]:
    """How many tokens each product of the next steps is given."""
    calls: list[int] = []
    layers = [m for m in model.model.modules() if isinstance(m, QuantizedLinear) and m._by_accelerator is not None]
    for shared in {id(found): found for layer in layers if (found := layer._by_accelerator.func.__self__)}.values():
        product = shared._product
        shared._product = lambda given, product=product: calls.append(len(given)) or product(given)
    return calls


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_is_the_dequantised_one(generated: Make, name: str, tmp_path: Path, only_experts: Path) -> None:
    """Against floats of the same values: only the order of sums differs."""
    path = packed_file(generated(without_choice(name)), tmp_path / "packed.gguf")
    ours, floats = load(path), load(path, "cpu", rules_path=only_experts)
    wanted = logits_of(floats.model, PROMPT)
    assert (logits_of(ours.model, PROMPT) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not floats.on_accelerators.names() and ours.on_accelerators.names()


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_packed_is_held_as_floats_or_read_on_the_cpu(
    generated: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrimoe_kt.host.hf import loading

    read: list[torch.Tensor] = []
    monkeypatch.setattr(loading, "bring_in", lambda experts, dense, progress: read.extend(dense))
    ours = load(packed_file(generated(without_choice(name)), tmp_path / "packed.gguf"))
    held = {at for at, value in ours.model.state_dict().items() if value.ndim > 1}
    assert {at for at in held if not at.endswith(tuple(FLOAT))} == set()
    assert not read and ours.loader.packed.keys() - ours.on_accelerators.names() == {"token_embd.weight"}


@pytest.mark.parametrize("name", COUNTS)
@torch.no_grad()
def test_layers_of_one_input_are_one_product(generated: Make, name: str, tmp_path: Path) -> None:
    ours = load(packed_file(generated(without_choice(name)), tmp_path / "packed.gguf"))
    calls = count_products(ours)
    for tokens in ([PROMPT], [PROMPT[:1]]):
        calls.clear()
        ours.model(input_ids=torch.tensor(tokens))
        assert len(calls) == COUNTS[name]
        assert set(calls[:-1]) == {len(tokens[0])}


def test_a_tied_head_is_packed_there_and_looked_up_here(generated: Make, tmp_path: Path) -> None:
    path = rewritten(
        generated(Shape(dense_type=Type.Q8_0)).path,
        tmp_path / "tied.gguf",
        tensors=lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "output.weight"},
    )
    ours, on_cpu = load(path), load(path, "cpu")
    head, embedding = ours.model.lm_head, ours.model.model.embed_tokens
    assert isinstance(head, QuantizedLinear) and isinstance(embedding, QuantizedEmbedding)
    assert "token_embd.weight" in ours.on_accelerators.names()
    wanted = logits_of(on_cpu.model, PROMPT)
    assert (logits_of(ours.model, PROMPT) - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
def test_a_load_takes_what_was_planned(generated: Make, name: str, kind: Type, tmp_path: Path) -> None:
    """Dense weights, slots and a conversation's keys and values, within 2 %: all that stays."""
    model = generated(without_choice(name))
    ours = load(packed_file(model, tmp_path / "packed.gguf", kind), context_tokens=300)
    plan = ours.plans["emulated"]
    floats = {value.data_ptr(): value.nbytes for value in ours.model.state_dict().values()}
    dense = ours.on_accelerators.device_bytes(torch.float32) + sum(floats.values())
    assert abs(plan.needs.dense_bytes - dense) <= 0.02 * dense
    slots = ours.runtime.lanes[0].pool.num_bytes
    engine = TokenGenerator(ours, set())
    for at in range(0, 300, 100):
        engine.append([index % 250 for index in range(at, at + 100)])
    cache = sum(layer_bytes(layer) for layer in engine.conversation.cache.layers)
    kept = sum((each.keys + each.values) * 300 * 4 + each.state_bytes for each in plan.needs.kept)
    taken, planned = dense + slots + cache, plan.needs.dense_bytes + plan.slots_bytes + kept
    assert abs(planned - taken) <= 0.02 * taken
    assert plan.needs.cache_bytes(300) >= cache, "and a second copy of what grows"


@pytest.mark.parametrize("place", ["cpu", "emulated:0"])
def test_rules_may_want_floats(generated: Make, tmp_path: Path, place: str) -> None:
    rules = tmp_path / "floats.yaml"
    rules.write_text(
        "- match: {name: '\\.experts$'}\n"
        "  replace: {class: hybrimoe_kt.operators.experts.HybriMoEExperts}\n  recursive: false\n"
        "- match: {name: '_proj$'}\n"
        "  replace: {class: hybrimoe_kt.operators.linear.QuantizedLinear, kwargs: {gpu: float, cpu: float}}\n",
        encoding="utf-8",
    )
    ours = load(packed_file(generated(Shape()), tmp_path / "packed.gguf"), place, rules_path=rules)
    assert not ours.on_accelerators.names() and not ours.loader.packed
    assert any(at.endswith("q_proj.weight") for at in ours.model.state_dict())


@pytest.mark.parametrize("kwargs", ["gpu: float, cpu: float", "absorb_for_prefill: false"])
@pytest.mark.parametrize("place", ["cpu", "emulated:0"])
@torch.no_grad()
def test_up_projections_that_attention_reads_are_floats(
    generated: Make, tmp_path: Path, only_experts: Path, place: str, kwargs: str
) -> None:
    """Of a file that has them as one tensor, which a linear layer of its own could keep."""
    path = packed_file(generated(without_choice("deepseek2-old-kv_b-q_lora-yarn")), tmp_path / "packed.gguf")
    rules = tmp_path / "floats.yaml"
    rules.write_text(
        "- match: {name: '\\.experts$'}\n"
        "  replace: {class: hybrimoe_kt.operators.experts.HybriMoEExperts}\n  recursive: false\n"
        "- match: {name: '\\.self_attn$'}\n"
        f"  replace: {{class: hybrimoe_kt.operators.attention_mla.AbsorbedMLA, kwargs: {{{kwargs}}}}}\n"
        "- match: {name: '_proj\\w*$'}\n"
        "  replace: {class: hybrimoe_kt.operators.linear.QuantizedLinear}\n",
        encoding="utf-8",
    )
    ours, floats = load(path, place, rules_path=rules), load(path, "cpu", rules_path=only_experts)
    state = ours.model.state_dict()
    assert any(at.endswith("kv_b_proj.weight") for at in state)
    assert not any(at.endswith("o_proj.weight") for at in state)
    wanted = logits_of(floats.model, PROMPT)
    past = ours.model(input_ids=torch.tensor([PROMPT[:-1]]), use_cache=True).past_key_values
    step = ours.model(input_ids=torch.tensor([PROMPT[-1:]]), past_key_values=past).logits[0, -1]
    assert (step - wanted[-1]).norm() <= 0.05 * wanted[-1].norm()


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3next", "deepseek3"])
def test_packaged_rules_for_two_cards_give_the_same_model(
    generated: Make, name: str, tmp_path: Path, only_experts: Path
) -> None:
    """The first layer on one emulated card, the rest on another; nothing but what no rule names stays floats."""
    path = packed_file(generated(without_choice(name)), tmp_path / "packed.gguf")
    packaged = resources.files(optimize_rules).joinpath(f"{name}-multi-gpu.yaml").read_text(encoding="utf-8")
    rules = tmp_path / "two.yaml"
    first_half = re.sub(r"(\\\.layers\\\.)\(\\d\|[^)]*\)", r"\g<1>0", packaged)
    rules.write_text(first_half.replace("cuda:", "emulated:"), encoding="utf-8")
    options = {"cpu_backend": "torch_reference", "cache_size": "all"}
    ours = load_model(path, rules_path=rules, option_overrides=options, progress=False)
    places = ours.placement.places
    assert places["model.layers.0"] == "emulated:0" and places["model.layers.1"] == places["lm_head"] == "emulated:1"
    assert all(plan.needs.packed_bytes for plan in ours.plans.values()) and len(ours.plans) == 2
    packed = sum(plan.needs.packed_bytes for plan in ours.plans.values())
    assert abs(packed - ours.on_accelerators.device_bytes(torch.float32)) <= 0.02 * packed
    held = {at for at, value in ours.model.state_dict().items() if value.ndim > 1}
    assert {at for at in held if not at.endswith(tuple(FLOAT))} == set()
    wanted = logits_of(load(path, "cpu", rules_path=only_experts).model, PROMPT)
    assert (logits_of(ours.model, PROMPT) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.kernels
def test_a_gpu_whose_kernels_cannot_be_built_gets_floats(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu_dense.TritonGpu, "unusable", lambda device: None)
    gpu_dense.can_multiply.cache_clear()
    made = Injector(packaged_rules("qwen3moe"), None, "cuda:0", {}, None)  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_dense, "_by_kernels", lambda *_: lambda given: given)
    monkeypatch.setattr(gpu_dense.DenseMatrices, "load", lambda self, device: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **given: torch.zeros(1))
    assert made._arithmetic(QuantizedLinear, "cuda:0") == {}

    def without_compiler(self: object, device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(gpu_dense.DenseMatrices, "load", without_compiler)
    gpu_dense.can_multiply.cache_clear()
    assert made._arithmetic(QuantizedLinear, "cuda:0") == made._arithmetic(AbsorbedMLA, "cuda:0") == {"gpu": "float"}
    assert "dense weights become floats on cuda:0, as its kernels cannot be built: RuntimeError: Failed" in caplog.text
    assert made._arithmetic(QuantizedEmbedding, "cuda:0") == made._arithmetic(QuantizedLinear, "cpu") == {}
    doctor = Injector(packaged_rules("qwen3moe"), None, "cuda:0", {}, None, tries_kernels=False)  # type: ignore[arg-type]
    assert doctor._arithmetic(QuantizedLinear, "cuda:0") == {}
    gpu_dense.can_multiply.cache_clear()


@pytest.mark.kernels
def test_the_kernels_are_tried_where_they_run() -> None:
    pytest.importorskip("triton")
    assert gpu_dense.can_multiply(DEVICE)


@pytest.mark.parametrize(
    ("backend", "place", "wanted"),
    [
        ("torch", "cuda:0", {"gpu": "float"}),
        ("torch_reference", "cuda:1", {"gpu": "float"}),
        ("torch", "emulated:0", {}),
        ("triton", "emulated:0", {"gpu": "triton"}),
        ("triton", "cuda:0", {"gpu": "triton"}),
    ],
)
def test_dense_weights_follow_the_experts_backend(backend: str, place: str, wanted: dict[str, str]) -> None:
    made = Injector(packaged_rules("qwen3moe"), None, place, {"gpu_backend": backend}, None)  # type: ignore[arg-type]
    assert made._arithmetic(QuantizedLinear, place) == wanted


def test_a_context_of_no_tokens_is_refused(generated: Make) -> None:
    with pytest.raises(ConfigError, match="context_tokens is -5, valid: 1 or more"):
        load(generated(Shape()).path, context_tokens=-5)
