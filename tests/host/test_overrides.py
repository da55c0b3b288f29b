"""Metadata in the place of a file's own: what it does, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType

from hybrimoe_kt import load
from hybrimoe_kt.cli.main import main
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.weights.overrides import parse_overrides
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.rewritten import rewritten

from .families import random_model, save_checkpoint
from .stock import logits_of

Generated = Callable[[Shape], GeneratedModel]
PLACES = {"cpu_backend": "torch_reference", "accelerator": "none"}


def test_each_type_is_read() -> None:
    texts = ["a.b=int:-4,c=float:0.5", "d=bool:true", "e=str:x:y=z", "d=bool:false"]
    assert parse_overrides(texts) == {"a.b": -4, "c": 0.5, "d": False, "e": "x:y=z"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.b", "write KEY=TYPE:VALUE, as in"),
        ("a=4", "write KEY=TYPE:VALUE"),
        ("=int:4", "write KEY=TYPE:VALUE"),
        ("a=itn:4", r"'itn'.*did you mean 'int'"),
        ("a=int:four", "'four' is no int"),
        ("a=int:4.5", "'4.5' is no int"),
        ("a=bool:yes", "'yes' is no bool"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_overrides([text])


def test_fewer_active_experts_are_those_of_a_file_that_says_so(generated: Generated, tmp_path: Path) -> None:
    model = generated(Shape(top_k=4))
    keys = {"qwen3moe.expert_used_count": (2, GGUFValueType.UINT32)}
    wanted = load_model(rewritten(model.path, tmp_path / "m.gguf", keys), option_overrides=PLACES, progress=False)
    found = load_model(model.path, option_overrides=PLACES, metadata={"qwen3moe.expert_used_count": 2}, progress=False)
    whole = load_model(model.path, option_overrides=PLACES, progress=False)
    prompt = list(range(97, 120))
    logits = logits_of(found.model, prompt)
    assert torch.equal(logits, logits_of(wanted.model, prompt))
    assert not torch.equal(logits, logits_of(whole.model, prompt))


def test_what_cannot_take_its_place(generated: Generated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = generated(Shape()).path
    with pytest.raises(ConfigError, match=r"qwen3moe\.block_count: .*\.gguf has int there, not str"):
        load(path, metadata={"qwen3moe.block_count": "two"})
    folder = save_checkpoint("qwen3moe", random_model("qwen3moe"), tmp_path)
    with pytest.raises(ConfigError, match=r"changes the metadata of GGUF files; change config\.json here"):
        load(folder, metadata={"qwen3moe.expert_used_count": 1})
    arguments = ["--gguf_path", str(path), "--prompt", "hi", "--override-kv", "qwen3moe.expert_used_count=9"]
    assert main(arguments) == 2
    assert "write KEY=TYPE:VALUE" in capsys.readouterr().err
    assert main([*arguments[:-1], "qwen3moe.expert_used_count=int:9"]) == 2
    assert "routes each token to 9 of 8 experts" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["qwen3moe.expert_usde_count", "qwen3mo.expert_used_count"])
def test_a_key_that_nobody_reads_is_told(generated: Generated, caplog: pytest.LogCaptureFixture, key: str) -> None:
    load_model(generated(Shape()).path, option_overrides=PLACES, metadata={key: 1}, progress=False)
    assert f"not used here, nor by llama.cpp: {key}" in caplog.text
