"""Dense weights stay as the file has them, family by family: the same numbers as dequantised, and no floats beside."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf.quants import quantize
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml import linear
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.host.hf.sources import open_source
from hybrimoe_kt.operators.embedding import QuantizedEmbedding
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import GeneratedModel, Shape, Type
from tests.support.rewritten import Tensors, rewritten

from .families import random_model, save_checkpoint
from .stock import logits_of, stock_model
from .test_equality import PROMPT, SHAPES

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
Make = Callable[[Shape], GeneratedModel]

EXACT = {"accelerator": "none", "cpu_backend": "torch_reference"}
ONLY_EXPERTS = """
- match: {name: '\\.layers\\.\\d+\\..*\\.experts$'}
  replace: {class: hybrimoe_kt.operators.experts.HybriMoEExperts}
  recursive: false
"""
FLOAT = {"mlp.gate.weight", "router.weight", "shared_expert_gate.weight", "conv1d.weight", "e_score_correction_bias"}
"""What of two dimensions the rules leave to Transformers."""


@pytest.fixture
def only_experts(tmp_path: Path) -> Path:
    """Rules without a word on linear layers."""
    file = tmp_path / "experts.yaml"
    file.write_text(ONLY_EXPERTS, encoding="utf-8")
    return file


def packed_file(model: GeneratedModel, out: Path, kind: Type = Type.Q8_0) -> Path:
    """A copy whose matrices are of `kind`, also those that the generator leaves floats."""

    def pack(tensors: Tensors) -> Tensors:
        return {name: _packed(name, *tensor, kind) for name, tensor in tensors.items()}

    return rewritten(model.path, out, tensors=pack)


def _packed(name: str, data: object, stored: gguf.GGMLQuantizationType, kind: Type) -> tuple:  # type: ignore[type-arg]
    is_matrix = stored == Type.F32 and data.ndim > 1 and "ffn_gate_inp" not in name  # type: ignore[attr-defined]
    if not is_matrix or data.shape[-1] % GGML_QUANT_SIZES[kind][0]:  # type: ignore[attr-defined]
        return data, stored
    return quantize(data, kind), kind  # type: ignore[arg-type]


def without_choice(name: str) -> Shape:
    """A family's shape in which every expert is routed to, so that no rounding chooses another one."""
    return dataclasses.replace(SHAPES[name], experts=4, top_k=4, groups=2)


def load(path: Path, rules: Path | None = None, **options: object) -> LoadedModel:
    return load_model(path, rules_path=rules, option_overrides=EXACT, progress=False, **options)  # type: ignore[arg-type]


def float_state(path: Path, names: list[str], shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Parameters as they are where nothing is packed."""
    wanted = dict(zip(names, shapes, strict=True))
    state = open_source(path, None).state(wanted, torch.float32, lambda name: torch.device("cpu"))
    return {name: lazy[...] for name, lazy in state.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_each_layer_multiplies_by_what_it_would_be_dequantised_to(
    generated: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed_file(generated(without_choice(name)), tmp_path / "packed.gguf")
    model = load(path).model
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear) and m._product is not None}
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    state = float_state(path, [f"{at}.weight" for at in layers], shapes)
    assert len(layers) >= 4 * model.config.num_hidden_layers + 1
    for at, layer in layers.items():
        weight = state[f"{at}.weight"]
        for tokens, by_bfloat16 in ((3, False), (65, True)):
            monkeypatch.setattr(linear, "multiplies_bfloat16", lambda by=by_bfloat16: by)
            given = torch.randn(tokens, layer.in_features, generator=torch.Generator().manual_seed(0))
            wanted = functional.linear(given, weight, layer.bias)
            bound = given.norm(dim=1, keepdim=True) * weight.norm(dim=1)
            assert ((layer(given) - wanted).abs() <= 0.02 * bound).all(), at
    embedding = model.model.embed_tokens
    assert isinstance(embedding, QuantizedEmbedding) and embedding._packed is not None
    rows = float_state(path, ["model.embed_tokens.weight"], [(embedding.num_embeddings, embedding.embedding_dim)])
    assert torch.equal(embedding(torch.arange(embedding.num_embeddings)), rows["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", SHAPES)
def test_the_model_is_the_dequantised_one(generated: Make, name: str, tmp_path: Path, only_experts: Path) -> None:
    """Against rules that leave everything but the experts to Transformers.

    Linear attention makes much of a rounded bit in some tokens (0.16 of Q8_0), so it is given finer ones: 0.009.
    """
    kind = Type.F16 if name.startswith(("qwen3next", "qwen35")) else Type.Q8_0
    path = packed_file(generated(without_choice(name)), tmp_path / "packed.gguf", kind)
    ours, floats = load(path), load(path, only_experts)
    assert not floats.loader.packed and ours.loader.packed
    wanted = logits_of(floats.model, PROMPT)
    errors = (logits_of(ours.model, PROMPT) - wanted).norm(dim=1) / (wanted - wanted.mean(dim=1, keepdim=True)).norm(
        dim=1
    )
    assert 0 < errors.max() < 0.05, "measured up to 0.022 on AVX2"


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_that_is_packed_is_held_as_floats(
    generated: Make, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = packed_file(generated(without_choice(name)), tmp_path / "packed.gguf")
    with caplog.at_level(logging.INFO):
        ours = load(path)
    assert not [message for message in caplog.messages if "stays float" in message]
    held = {at: value for at, value in ours.model.state_dict().items() if value.ndim > 1}
    assert {at for at in held if not at.endswith(tuple(FLOAT))} == set()
    packed_bytes = sum(matrix.data.numel() for matrix in ours.loader.packed.values())
    assert sum(value.nbytes for value in held.values()) < 0.1 * packed_bytes
    in_file = {name: tensor.data for name, tensor in ours.loader.file.tensors.items()}  # type: ignore[union-attr]
    for tensor, matrix in ours.loader.packed.items():
        assert matrix.data.data_ptr() == in_file[tensor].ctypes.data, "in place"


def test_a_head_that_the_file_lacks_is_the_packed_embedding(generated: Make, tmp_path: Path) -> None:
    path = rewritten(
        generated(Shape(dense_type=Type.Q8_0)).path,
        tmp_path / "tied.gguf",
        tensors=lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "output.weight"},
    )
    ours = load(path)
    assert ours.model.config.tie_word_embeddings
    assert {"lm_head.weight", "model.embed_tokens.weight"}.isdisjoint(ours.model.state_dict())
    head, embedding = ours.model.lm_head, ours.model.model.embed_tokens
    assert isinstance(head, QuantizedLinear) and isinstance(embedding, QuantizedEmbedding)
    rows = embedding(torch.arange(embedding.num_embeddings))
    given = torch.randn(3, head.in_features)
    wanted = given @ rows.t()
    assert (head(given) - wanted).norm() < 0.02 * wanted.norm()
    assert torch.isfinite(logits_of(ours.model, PROMPT)).all()


def test_a_tied_head_of_floats_is_one_with_the_embedding(generated: Make, tmp_path: Path, only_experts: Path) -> None:
    """Of a file of floats, and where rules leave both to Transformers."""
    for kind, rules in ((Type.F32, None), (Type.Q8_0, only_experts)):
        path = rewritten(
            generated(Shape(dense_type=kind)).path,
            tmp_path / f"{kind.name}.gguf",
            tensors=lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "output.weight"},
        )
        ours = load(path, rules)
        assert ours.model.lm_head.weight.data_ptr() == ours.model.model.embed_tokens.weight.data_ptr()
        assert torch.isfinite(logits_of(ours.model, PROMPT)).all()


@pytest.mark.parametrize("name", ["qwen3moe", "qwen35moe", "deepseek2"])
def test_a_configuration_beside_the_file_packs_the_same(generated: Make, name: str, tmp_path: Path) -> None:
    path = packed_file(generated(SHAPES[name]), tmp_path / "packed.gguf")
    alone = load(path)
    alone.model.config.save_pretrained(tmp_path)
    beside = load(path, model_path=tmp_path)
    assert beside.loader.packed.keys() == alone.loader.packed.keys()
    assert torch.equal(logits_of(beside.model, PROMPT), logits_of(alone.model, PROMPT))


def test_a_checkpoint_s_floats_stay_floats(tmp_path: Path) -> None:
    stock = random_model("qwen3moe")
    ours = load(save_checkpoint("qwen3moe", stock, tmp_path))
    layers = [module for module in ours.model.modules() if isinstance(module, QuantizedLinear)]
    assert layers and all(isinstance(layer.weight, nn.Parameter) for layer in layers)
    assert not ours.loader.packed
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(stock, PROMPT), rtol=0, atol=1e-4)


def test_without_the_library_everything_is_floats(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """And embeddings still stay as they are: nobody multiplies by them."""
    model = generated(Shape(dense_type=Type.Q8_0))
    monkeypatch.setattr(ggml, "_opened", [])
    monkeypatch.setitem(sys.modules, "libggml", None)
    ours = load(model.path)
    assert list(ours.loader.packed) == ["token_embd.weight"]
    assert all(m._product is None for m in ours.model.modules() if isinstance(m, QuantizedLinear))
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(stock_model(model), PROMPT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_short_floats(generated: Make, dtype: torch.dtype) -> None:
    model = generated(dataclasses.replace(without_choice("qwen3moe"), dense_type=Type.Q8_0))
    wanted = logits_of(load(model.path).model, PROMPT)
    ours = load(model.path, dtype=dtype).model
    assert {value.dtype for value in ours.parameters()} == {dtype}
    errors = (logits_of(ours, PROMPT) - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.max() < 0.05


def test_a_matrix_of_another_shape_is_told_by_name(generated: Make, tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> Tensors:
        data, kind = tensors["blk.1.attn_q.weight"]
        return tensors | {"blk.1.attn_q.weight": (data[:-1], kind)}

    path = rewritten(generated(Shape(dense_type=Type.Q8_0)).path, tmp_path / "cut.gguf", tensors=cut)
    assert GgufFile(path).tensor("blk.1.attn_q.weight").shape[0] == 127
    with pytest.raises(ModelError, match=r"attn_q.weight has shape \[127, 256\], the configuration wants \[128, 256\]"):
        load(path)
