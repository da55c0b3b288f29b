"""Which layers are read as parts of graphs, and which are refused with which reason."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe_kt.backends.ggml import dense_layer
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.cli.main import main
from hybrimoe_kt.engine.token_generator import TokenGenerator
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError
from hybrimoe_kt.host.hf.architectures import ARCHITECTURES
from hybrimoe_kt.host.hf.layer_parts import NotDescribed, head_parts, layer_parts
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.operators.layer_ggml import GgmlLayer
from tests.support.generated_model import GeneratedModel, Shape

from .test_equality import SHAPES

pytestmark = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
Make = Callable[[Shape], GeneratedModel]


def load(model: GeneratedModel, **given: Any) -> LoadedModel:
    return load_model(model.path, option_overrides={"accelerator": "none"}, progress=False, **given)


@pytest.fixture
def loaded(generated: Make) -> LoadedModel:
    return load(generated(Shape()))


def refusal(loaded: LoadedModel) -> str:
    """Why the first layer is refused."""
    model: Any = loaded.model
    with pytest.raises(NotDescribed) as refused:
        layer_parts(model.model.layers[0].stock, model.config, model.model.rotary_emb, loaded.architecture)
    return str(refused.value)


def test_what_no_graph_does_is_refused_with_its_reason(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    layer = model.model.layers[0].stock
    model.config.hidden_act = "gelu"
    assert refusal(loaded) == "its activation is gelu"
    model.config.hidden_act = "silu"
    model.config.clip_qkv = 3.0
    assert "clips" in refusal(loaded)
    del model.config.clip_qkv
    layer.input_layernorm.bias = nn.Parameter(torch.zeros(256))
    assert "biases" in refusal(loaded)
    layer.input_layernorm.bias = None
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.double()
    assert "float64" in refusal(loaded)
    model.model.rotary_emb.rope_type = "longrope"
    assert "longrope" in refusal(loaded)
    model.model.rotary_emb.rope_type = "default"
    layer.__class__ = type("SomeDecoderLayer", (layer.__class__,), {})
    assert refusal(loaded) == "SomeDecoderLayer is not known here"


@pytest.mark.parametrize(
    ("name", "own", "models", "window"),
    [
        ("qwen3moe", 40, 40, 40),
        ("qwen3moe", None, 40, 0),
        ("qwen2moe", None, 40, 0),
        ("mixtral", None, 40, 40),
    ],
)
def test_a_window_is_the_layers_own(generated: Make, name: str, own: int | None, models: int, window: int) -> None:
    """Of the configuration's only where attention asks that; layers without one have no attribute, or None."""
    loaded = load(generated(SHAPES[name]))
    model: Any = loaded.model
    layer = model.model.layers[0].stock
    model.config.sliding_window = models
    if own is not None:
        layer.self_attn.sliding_window = own
    elif hasattr(layer.self_attn, "sliding_window"):
        layer.self_attn.sliding_window = None
    read = layer_parts(layer, model.config, model.model.rotary_emb, loaded.architecture)
    assert read.parts.attention.window == window


def test_q8_0_is_refused_for_heads_that_are_no_whole_blocks(generated: Make) -> None:
    with pytest.raises(ConfigError, match=r"layer 0: kv_cache_type q8_0 .* these are 48; take f16 or f32"):
        load(generated(Shape(head_dim=48)), kv_cache_type="q8_0")
    with pytest.raises(ConfigError, match="these are 80"):  # latents and what is rotated
        load(generated(SHAPES["deepseek2"]), kv_cache_type="q8_0")
    assert load(generated(Shape(head_dim=64)), kv_cache_type="q8_0").dense is not None
    with pytest.raises(ConfigError, match="layer 0: kv_cache_type bf16 is for layers on a GPU"):
        load(generated(Shape()), kv_cache_type="bf16")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_model_may_be_called_by_anybody(generated: Make, mode: Callable[[], Any]) -> None:
    """After the engine made all memory in a mode of its own; masks and positions of the caller's are obeyed."""
    loaded = load(generated(Shape()), kv_cache_type="f32")
    engine, model = TokenGenerator(loaded, set()), loaded.model
    ids = list(range(20, 26))
    wanted = engine.append(ids).clone()
    with mode():
        for text in (ids, ids * 7):
            found = model(input_ids=torch.tensor([text]), past_key_values=engine.new_cache(), use_cache=True).logits
            assert found.isfinite().all()
        one = model(input_ids=torch.tensor([ids]), past_key_values=engine.new_cache(), use_cache=True).logits[0, -1]
        torch.testing.assert_close(one.detach(), wanted, rtol=0, atol=1e-4)
        padded = {"attention_mask": torch.tensor([[0, 0] + [1] * 6]), "position_ids": torch.tensor([[1, 1, *range(6)]])}
        other = model(
            input_ids=torch.tensor([[7, 9, *ids]]), past_key_values=engine.new_cache(), use_cache=True, **padded
        ).logits[0, -1]
        torch.testing.assert_close(other.detach(), wanted, rtol=0, atol=1e-4)
        with torch.inference_mode(False):
            assert engine.append([3]).isfinite().all()


@pytest.mark.parametrize("name", SHAPES)
def test_a_router_is_found_out(generated: Make, name: str) -> None:
    """Only where groups come first is a choice not the graph's; it is known all the same."""
    loaded = load(generated(SHAPES[name]))
    layers = [layer for layer in loaded.model.model.layers if isinstance(layer, GgmlLayer) and layer.dense is not None]
    assert layers
    for layer in layers:
        parts = layer.dense.parts
        assert (parts.choice is None) == (parts.router is None), name
    last = layers[-1].dense.parts
    assert last.choice.top_k == loaded.model.config.num_experts_per_tok
    assert (last.choice.num_groups > 1) == (name == "deepseek3")


def test_layers_that_stay_as_they_are_are_named(
    generated: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "qwen3moe", dataclasses.replace(ARCHITECTURES["qwen3moe"], layers={}))
    with caplog.at_level(logging.INFO, logger="hybrimoe_kt.host.hf.dense_layers"):
        found = load(generated(Shape()))
    assert found.dense is None
    assert caplog.messages[-1] == (
        "layers 0 to 1 are computed by Transformers' own modules: Qwen3MoeDecoderLayer is not known here"
    )


def test_without_ggml_a_model_is_transformers_own(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise HostCompatibilityError("the ggml CPU backend needs the package libggml-python")

    monkeypatch.setattr(ggml, "unusable", lambda: "not installed")
    monkeypatch.setattr(dense_layer, "pool", missing)
    options = {"accelerator": "none", "cpu_backend": "torch_reference"}
    loaded = load_model(generated(Shape()).path, option_overrides=options, progress=False)
    assert loaded.dense is None
    engine = TokenGenerator(loaded, set())
    assert engine.append([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2", "qwen35moe"])
def test_layers_in_bfloat16_are_graphs_as_well(generated: Make, name: str) -> None:
    """As those are that a rule leaves on the CPU of a machine whose GPU has the others."""
    model = generated(dataclasses.replace(SHAPES[name], experts=4, top_k=4))
    text = [(7 * at) % 250 for at in range(20)]
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = TokenGenerator(load(model, dtype=dtype), set())
        assert engine.loop is not None
        by_loop = engine.append(text).clone()
        engine.reset()
        engine.loop = None
        by_layers = engine.append(text)
        span = by_loop.max() - by_loop.min()
        assert (by_loop - by_layers).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * span
        logits.append(by_loop)
    assert (logits[0] - logits[1]).abs().max() <= 0.03 * (logits[0].max() - logits[0].min())


def test_the_head_of_granite_divides_its_logits(generated: Make) -> None:
    loaded = load(generated(SHAPES["granitemoe"]))
    assert head_parts(loaded.model, loaded.architecture).logit_factor == 1 / loaded.model.config.logits_scaling
    assert loaded.dense is not None
    assert loaded.dense.embedding_factor == loaded.model.config.embedding_multiplier


def test_options_of_the_operator(tmp_path: Path, generated: Make) -> None:
    for kwargs in ({"kv_cache_type": "f61"}, {"most_tokens": -1}, {"most_tokens": True}):
        with pytest.raises(ConfigError, match=r"valid|did you mean"):
            GgmlLayer.check_kwargs(kwargs)
    with pytest.raises(ConfigError, match=r"decoder layer"):
        GgmlLayer("model.norm", None, None, nn.Module())


def test_a_wrong_type_is_refused_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kv_cache_type", "f61", "--prompt", "Hello"])
    assert "f16" in capsys.readouterr().err
