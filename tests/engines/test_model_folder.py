"""What engines read of a model beside its weights: the words of published files, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.engines import model_folder as folders
from hybrimoe_kt.host.engines.dense_names import dense_parameters, published
from hybrimoe_kt.host.engines.model_folder import has_tokenizer, model_folder
from hybrimoe_kt.host.hf.architectures.rotary import Rotary
from hybrimoe_kt.host.hf.language_models import language_model
from hybrimoe_kt.models import embedded_model
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.vocabularies import sentencepiece

Make = Callable[[Shape], GeneratedModel]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_embedded_model() -> None:
    folder = model_folder(embedded_model(), lambda name: f"Engines{name}")
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["EnginesQwen3MoeForCausalLM"]
    assert config.dtype == torch.bfloat16
    assert has_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], tokenize=False)
    assert "Hello!" in told
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id in ends
    assert model_folder(embedded_model()) == folder, "made once"


def test_several_processes_make_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = {each.result() for each in [pool.submit(model_folder, embedded_model()) for _ in range(4)]}
    assert len(found) == 1
    assert len(list(found.pop().parent.iterdir())) == 1, "nothing half made is left"


def test_nothing_is_left_of_a_folder_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ModelError("no")

    monkeypatch.setattr(folders, "_describe", fail)
    with pytest.raises(ModelError):
        model_folder(embedded_model())
    assert not list((tmp_path / "cache").rglob("being-made-*"))


def test_a_tokenizer_that_no_file_holds_is_told(generated: Make) -> None:
    shape = Shape(vocabulary=sentencepiece(), hidden=64, inter=64, dense_inter=64, heads=2, kv_heads=1, layers=1)
    assert not has_tokenizer(model_folder(generated(shape).path))


def test_a_checkpoint_is_its_own_folder_unless_it_is_quantised(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"weights")
    (made / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert model_folder(made) == made
    (made / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": {"bits": 8}}))
    folder = model_folder(made)
    assert folder != made
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "qwen3_moe"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    (made / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be used"):
        model_folder(made)
    with pytest.raises(ModelError, match=r"no such file"):
        model_folder(tmp_path / "missing")


def test_dense_weights_have_published_names() -> None:
    """Of a family whose names Transformers changes as it loads: a checkpoint's are given, each tensor once."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model("mixtral", vocab_size=64, num_key_value_heads=1, num_local_experts=4, **sizes)
    with torch.device("meta"):
        outline = language_model(config)
    names = dense_parameters(outline)
    assert "model.layers.0.mlp.gate.weight" in names
    assert not any(".experts." in name for name in names)
    found = dict(published(outline, {name: torch.zeros(shape) for name, shape in names.items()}))
    assert found["model.layers.0.block_sparse_moe.gate.weight"].shape == (4, 32)
    assert len(found) == len(names)


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def test_rotary_positions_in_published_words() -> None:
    assert Rotary(base=10000.0).published(PLAIN) == PLAIN
    assert Rotary(base=10000.0, factor=4.0).published(PLAIN) == PLAIN | {"rope_type": "linear", "factor": 4.0}
    yarn = Rotary(base=10000.0, kind="yarn", factor=4.0, original_tokens=128).published(PLAIN)
    assert yarn["rope_type"] == "yarn"
    assert (yarn["factor"], yarn["original_max_position_embeddings"]) == (4.0, 128)
    assert "mscale" not in yarn
    latent = Rotary(
        base=1e4, kind="yarn", factor=4.0, original_tokens=128, log_multiplier=0.7, is_latent=True
    ).published(PLAIN)
    assert (latent["mscale"], latent["mscale_all_dim"]) == (0.7, 0.7)


def test_some_dimensions_that_stand_still() -> None:
    """As Gemma's files have it, by divisors of 1 and of 1e30, in the layers that look at everything alone."""
    divisors = torch.tensor([1.0, 1.0, 1e30, 1e30, 1e30, 1e30, 1e30, 1e30])
    kinds = {"full_attention": PLAIN, "sliding_attention": PLAIN}
    found = Rotary(base=1e6, window_base=1e4, divisors=divisors).published(kinds)
    assert found["full_attention"] == PLAIN | {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    assert found["sliding_attention"] == PLAIN
    with pytest.raises(ModelError, match=r"rope_freqs.weight .* which no config.json says; use a checkpoint"):
        Rotary(base=1e4, divisors=torch.tensor([1.0, 1.5, 8.0])).published(PLAIN)
