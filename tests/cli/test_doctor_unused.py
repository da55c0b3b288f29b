"""`hybrimoe doctor --model`: what of a file is not used, and what would keep it from loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from hybrimoe_kt.cli import doctor
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.rewritten import Tensors, rewritten

Generated = Callable[[Shape], GeneratedModel]
ONES = np.ones(32, np.float32), GGMLQuantizationType.F32


@pytest.fixture
def model(generated: Generated, tmp_path: Path) -> Path:
    """Two layers that are run and one that guesses, a picture's tensor, a key that nobody knows."""

    def add(tensors: Tensors) -> Tensors:
        return tensors | {"blk.2.nextn.eh_proj.weight": ONES, "v.patch.weight": ONES}

    keys = {
        "qwen3moe.block_count": (3, GGUFValueType.UINT32),
        "qwen3moe.nextn_predict_layers": (1, GGUFValueType.UINT32),
        "qwen3moe.attention.sliding_window": (64, GGUFValueType.UINT32),
        "qwen3moe.logit_scale": (1.0, GGUFValueType.FLOAT32),
    }
    return rewritten(generated(Shape()).path, tmp_path / "m.gguf", keys, add)


def test_everything_unused_has_its_reason(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--model", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["model"]
    assert report["refusal"] is None and report["num_expert_layers"] == 2
    unused = {each["name"]: each["reason"] for each in report["unused"]}
    assert unused["blk.2.nextn.eh_proj.weight"] == "only guesses further tokens"
    assert "pictures" in unused["v.patch.weight"]
    assert unused["qwen3moe.logit_scale"] == "with this value it changes nothing"
    assert unused["qwen3moe.attention.sliding_window"] == ""
    assert "shapes" in unused["qwen3moe.attention.value_length"] and "qwen3moe.embedding_length" not in unused
    assert doctor.main(["--model", str(model)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not used (nor by llama.cpp): qwen3moe.attention.sliding_window" in shown
    assert "not used (only guesses further tokens): blk.2.nextn.eh_proj.weight" in shown


def test_what_keeps_it_from_loading_is_told(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rewritten(model, tmp_path / "n.gguf", tensors=lambda found: found | {"blk.1.attn_sinks.weight": ONES})
    assert doctor.main(["--model", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "not ready: this file would not load" in shown
    assert "it would not load:" in shown and "tensor blk.1.attn_sinks.weight is not used by qwen3moe models" in shown
    assert doctor.main(["--model", str(model), "--json", "--override-kv", "qwen3moe.logit_scale=float:3"]) == 0
    assert "logit_scale is 3.0, which changes" in json.loads(capsys.readouterr().out)["model"]["refusal"]


def test_gate_and_up_in_one_tensor(generated: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = generated(Shape()).path

    def fuse(tensors: Tensors) -> Tensors:
        fused = {
            name: value for name, value in tensors.items() if "ffn_gate_exps" not in name and "ffn_up_exps" not in name
        }
        for layer in (0, 1):
            (gate, kind), (up, _) = (tensors[f"blk.{layer}.ffn_{role}_exps.weight"] for role in ("gate", "up"))
            fused[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate((gate, up), axis=1), kind
        return fused

    reports = []
    for path in (plain, rewritten(plain, tmp_path / "m.gguf", tensors=fuse)):
        assert doctor.main(["--model", str(path), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out)["model"])
    assert reports[0]["kinds"] == reports[1]["kinds"]
    assert reports[0]["expert_bytes"] == reports[1]["expert_bytes"]
    assert reports[0]["dense_bytes"] == reports[1]["dense_bytes"]
