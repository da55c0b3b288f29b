"""An architecture is one place: with one entry more, everything that asks for an architecture knows it."""

from __future__ import annotations

import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file, save_file

from hybrimoe_kt.cli import rules as rules_command
from hybrimoe_kt.host.hf.architectures import ARCHITECTURES, Architecture
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.host.rules.report import best_skeleton
from hybrimoe_kt.host.rules.rule_file import load_rules, packaged_rules
from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.weights.checkpoint import ExpertNames
from hybrimoe_kt.weights.gguf_file import GgufFile

from .families import MERGED, SPECIALS, random_model, save_checkpoint
from .stock import greedy, logits_of

# All that is written to add it. Its tensors are Qwen3-MoE's; its names, for the file, for the split of text, for
# the type of a checkpoint and for the experts in it, are nobody's.
MADE_UP = Architecture(
    gguf="made-up",
    model_type="qwen3_moe",
    other_types=("made_up",),
    keys={
        "hidden_size": "embedding_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "max_position_embeddings": "context_length",
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    },
    constants={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    skeleton={"hidden_size": 64, "num_hidden_layers": 7, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64},
    checkpoint_names=(ExpertNames(*(f"mlp.experts.{{expert}}.made_up_{role}" for role in ("gate", "up", "down"))),),
    splits={"made-up-split": (r" ?\w+|\s+|[^\w\s]+",)},
    tensor_table="qwen3moe",
)
PROMPT = random.Random(7).choices(range(250), k=23)
OVERRIDES = {"cpu_backend": "torch_reference", "accelerator": "emulated", "cache_size": 3}


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, MADE_UP.gguf, MADE_UP)


@pytest.fixture(scope="module")
def stock() -> torch.nn.Module:
    return random_model("qwen3moe")


@pytest.fixture
def file(tmp_path: Path, stock: torch.nn.Module) -> Path:
    """The stock model in a GGUF file of the made-up architecture."""
    path = tmp_path / "made-up.gguf"
    writer, config = GGUFWriter(str(path), MADE_UP.gguf), stock.config
    for ours, key in MADE_UP.keys.items():
        value = getattr(config, ours)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{MADE_UP.gguf}.{key}", value)
    writer.add_block_count(config.num_hidden_layers)
    write_tokenizer(writer)
    names = get_tensor_name_map(MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, value in stock.state_dict().items():
        for theirs, part in as_stored(name, value.numpy()):
            found = names.get_name(theirs, try_suffixes=(".weight",))
            assert found is not None, theirs
            writer.add_tensor(found, np.ascontiguousarray(part))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_stored(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray]]:
    block, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        gate, up = np.split(value, 2, axis=1)
        return [(f"{block}.gate_proj.weight", gate), (f"{block}.up_proj.weight", up)]
    return [(f"{name}.weight" if last == "down_proj" else name, value)]


def write_tokenizer(writer: GGUFWriter) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    spelling = bytes_to_unicode()
    tokens = [*(spelling[byte] for byte in range(256)), "".join(MERGED), *SPECIALS]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("made-up-split")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * len(SPECIALS))
    writer.add_token_merges([" ".join(MERGED)])


def test_its_file_loads_with_the_default_rules_and_answers_as_the_stock_model(
    file: Path, stock: torch.nn.Module
) -> None:
    ours = load_model(file, option_overrides=OVERRIDES, progress=False)
    assert ours.rules_file == packaged_rules("default") and not ours.warnings
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(stock, PROMPT), rtol=0, atol=1e-4)
    assert greedy(ours.model, PROMPT, 8)[0] == greedy(stock, PROMPT, 8)[0]
    assert ours.runtime.coordinator.stats.snapshot()["experts_on_gpu"] > 0


def test_its_checkpoint_loads(tmp_path: Path, stock: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qwen3moe", "qwen3vlmoe"):  # whose model type it has
        monkeypatch.delitem(ARCHITECTURES, name)
    saved = save_checkpoint("qwen3moe", stock, tmp_path) / "model.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "made_up"}))
    tensors = {
        re.sub(r"(\.experts\.\d+\.)(\w+)_proj\.weight", r"\1made_up_\2", name): value
        for name, value in load_file(saved).items()
    }
    save_file(tensors, saved, metadata={"format": "pt"})
    ours = load_model(tmp_path, option_overrides=OVERRIDES, progress=False)
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(stock, PROMPT), rtol=0, atol=1e-4)


def test_its_tokenizer_is_rebuilt_without_a_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(GgufFile(file), None)
    assert tokenizer.decode(tokenizer("the path")["input_ids"]) == "the path"
    assert not caplog.records


def test_rules_are_checked_on_its_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "made-up.yaml"
    mine.write_text(packaged_rules("default").read_text())
    assert best_skeleton(load_rules(mine)) == MADE_UP.name
    assert rules_command.main(["check", str(mine)]) == 0
    assert "model.layers.{0..6}.mlp.experts" in capsys.readouterr().out
