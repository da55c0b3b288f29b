"""Finding the layers of routed experts in a header, and outlines of them that read no weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.expert_layers import ExpertLayer, expert_layers, is_expert_tensor, num_layers
from hybrimoe_kt.weights.gguf_file import GgufFile
from hybrimoe_kt.weights.gguf_loader import GgufLoader
from tests.support.generated_model import GeneratedModel, Shape

OLD = Shape(architecture="llama", head_dim=64, expert_tensors=True)


@pytest.mark.parametrize(
    "shape", [Shape(), OLD, Shape(architecture="deepseek2", layers=2)], ids=lambda s: s.architecture
)
def test_layers_and_their_outlines(generated: Callable[[Shape], GeneratedModel], shape: Shape) -> None:
    file = GgufFile(generated(shape).path)
    layers = expert_layers(file)
    wanted = range(shape.dense_layers if shape.architecture == "deepseek2" else 0, shape.layers)
    assert layers == [ExpertLayer(n, shape.experts, shape.top_k, shape.hidden, shape.inter) for n in wanted]
    loader = GgufLoader(file)
    for layer in layers:
        outline = loader.layer_outline(**layer._asdict())
        assert outline.gate.data.is_meta
        assert not loader._gathered
        whole = GgufLoader(file).layer_experts(**layer._asdict())
        for ours, theirs in zip(outline.matrices, whole.matrices, strict=True):
            assert (ours.ggml_type, ours.rows, ours.columns) == (theirs.ggml_type, theirs.rows, theirs.columns)
            assert ours.data.shape == theirs.data.shape


def test_layers_that_guess_ahead_are_left_out(tiny_model: Path) -> None:
    file = GgufFile(tiny_model)
    file.metadata["qwen3moe.nextn_predict_layers"] = 1
    with pytest.raises(ModelError, match="1 of its 3 layers should only guess further tokens, but none looks like it"):
        num_layers(file)
    file.tensors["blk.2.nextn.eh_proj.weight"] = file.tensors["output_norm.weight"]
    assert num_layers(file) == 2
    assert [layer.layer for layer in expert_layers(file)] == [0, 1]
    for name in [name for name in file.tensors if name.startswith("blk.2.")]:
        del file.tensors[name]
    assert num_layers(file) == 2, "left out of the file, and still counted"
    file.metadata["qwen3moe.block_count"] = 2
    with pytest.raises(ModelError, match="none looks like it"):
        num_layers(file)


def test_damaged_headers(tiny_model: Path) -> None:
    file = GgufFile(tiny_model)
    file.metadata["qwen3moe.block_count"] = "six"
    with pytest.raises(ModelError, match=r"damaged GGUF: qwen3moe\.block_count is 'six'"):
        expert_layers(file)
    file.metadata["qwen3moe.block_count"] = 0
    with pytest.raises(ModelError, match="holds 3 layers, its metadata says 0"):
        expert_layers(file)


def test_shared_experts_are_dense() -> None:
    assert is_expert_tensor("blk.3.ffn_up_exps.weight") and is_expert_tensor("blk.0.ffn_down.7.weight")
    assert not is_expert_tensor("blk.3.ffn_up_shexp.weight") and not is_expert_tensor("blk.3.ffn_gate_inp.weight")
