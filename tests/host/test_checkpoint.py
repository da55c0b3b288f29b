"""Hugging Face directories without GGUF: the same model as stock Transformers loads from them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrimoe_kt.cli.main import main
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.loading import load_model

from .families import FAMILIES, QUICK, random_model, save_checkpoint
from .stock import greedy, logits_of

PROMPT = random.Random(7).choices(range(250), k=23)
EXACT = {"cpu_backend": "torch_reference", "accelerator": "none"}
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes a family's checkpoint once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = save_checkpoint(name, random_model(name), tmp_path_factory.mktemp(name))
        return folders[name]

    return make


@pytest.fixture
def damaged(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved("qwen3moe"), tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAMILIES]
)
def test_every_family_equals_the_stock_model(saved: Callable[[str], Path], name: str) -> None:
    stock = random_model(name)
    ours = load_model(
        saved(name), option_overrides={**EXACT, "accelerator": "emulated", "cache_size": 3}, progress=False
    )
    wanted = logits_of(stock, PROMPT)
    torch.testing.assert_close(logits_of(ours.model, PROMPT), wanted, rtol=0, atol=1e-4)
    assert greedy(ours.model, PROMPT, 8)[0] == greedy(stock, PROMPT, 8)[0]


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral", "granitemoe", "qwen35moe"])  # one a layout of the experts
def test_bf16_experts_run_on_the_llamafile_backend_as_f16(tmp_path: Path, name: str) -> None:
    stock = random_model(name).to(torch.bfloat16)
    save_checkpoint(name, stock, tmp_path)
    stock = stock.to(torch.float32)  # the same numbers, computed exactly
    ours = load_model(tmp_path, option_overrides={"accelerator": "none"}, progress=False)
    kinds = {matrix.type_name for experts in ours.runtime.store.layers.values() for matrix in experts.matrices}
    assert kinds == {"F16"}
    wanted = logits_of(stock, PROMPT)
    assert (logits_of(ours.model, PROMPT) - wanted).std() < 0.02 * wanted.std()


def test_experts_are_held_once_and_dense_weights_not_in_them(saved: Callable[[str], Path]) -> None:
    ours = load_model(saved("qwen3moe"), option_overrides=EXACT, progress=False)
    config, store = ours.model.config, ours.runtime.store
    values = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    assert store.num_bytes == 4 * values
    starts = {matrix.data.data_ptr() for experts in store.layers.values() for matrix in experts.matrices}
    assert len(starts) == 3 * config.num_hidden_layers
    assert not any(".experts." in name for name in ours.model.state_dict())


def test_a_checkpoint_in_several_files(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = random_model("qwen3moe")
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(model, PROMPT), rtol=0, atol=1e-4)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"1 of \d+ safetensors files missing, first 'model-00"):
        load_model(tmp_path, progress=False)


def test_the_language_part_of_a_model_that_also_sees(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Released Qwen3.5 checkpoints have vision tensors beside, and the text model's configuration inside another."""
    name = "qwen35moe"
    tensors = load_file(saved(name) / "model.safetensors")
    inner = {key.replace("model.", "model.language_model.", 1): value for key, value in tensors.items()}
    vision = {"model.visual.blocks.0.attn.qkv.weight": torch.zeros(8, 8)}
    save_file(inner | vision, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": config}))
    ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(random_model(name), PROMPT), rtol=0, atol=1e-4)


def test_kimi_k25_has_its_head_one_level_deeper(saved: Callable[[str], Path], tmp_path: Path) -> None:
    name = "kimi-k2"
    tensors = load_file(saved(name) / "model.safetensors")
    inner = {f"language_model.{key}": value for key, value in tensors.items()}
    vision = {
        "vision_tower.patch_embed.proj.weight": torch.zeros(8, 8),
        "mm_projector.proj.0.weight": torch.zeros(8, 8),
    }
    save_file(inner | vision, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((saved(name) / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": config}))
    ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    torch.testing.assert_close(logits_of(ours.model, PROMPT), logits_of(random_model(name), PROMPT), rtol=0, atol=1e-4)


def test_dense_layers_behind_sparse_ones_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """GLM-4.7-Flash's configuration could say it, and the model that runs it here could not."""
    shutil.copytree(saved("glm4-moe-lite"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"mlp_layer_types": ["dense", "sparse", "dense"]}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"mlp_layer_types .* has dense layers behind sparse ones"):
        load_model(tmp_path, progress=False)


def test_the_command_line_takes_the_directory(saved: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("qwen3moe")
    options = ("--prompt", "Hello", "--temperature", "0", "--max_new_tokens", "5", "--cpu_backend", "torch_reference")
    assert main(["--model_path", str(folder), *options]) == 0
    assert capsys.readouterr().out.strip()


def test_numbers_beyond_f16_are_refused(damaged: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)
        tensors[EXPERT][0, 0] = 2.0**20

    change(damaged, edit)
    with pytest.raises(ModelError, match=r"experts\.3\.down_proj\.weight holds 1.05e\+06, beyond the 65504 of F16"):
        load_model(damaged, progress=False)


def test_quantised_tensors_are_refused(damaged: Path) -> None:
    change(damaged, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.float8_e4m3fn)}))
    with pytest.raises(ModelError, match=r"is F8_E4M3 without scales; checkpoints of F32, F16, BF16, FP8 in"):
        load_model(damaged, progress=False)


def test_missing_and_contradicting_tensors_are_named(damaged: Path) -> None:
    norm = "model.layers.2.input_layernorm.weight"
    change(damaged, lambda tensors: tensors.pop(norm))
    with pytest.raises(ModelError, match=rf"no tensor for {norm}; the weights and the configuration belong"):
        load_model(damaged, progress=False)
    change(damaged, lambda tensors: tensors.update({norm: torch.ones(255)}))
    with pytest.raises(ModelError, match=rf"{norm}.*; the weights and the configuration belong to different models"):
        load_model(damaged, progress=False)
    change(damaged, lambda tensors: tensors.pop(EXPERT))
    with pytest.raises(ModelError, match=rf"tensor '{EXPERT}' is missing"):
        load_model(damaged, progress=False)


def test_ling_1_is_not_taken_for_ling_2(damaged: Path) -> None:
    """Their config.json files have one type."""
    config = json.loads((damaged / "config.json").read_text())
    named = {"model_type": "bailing_moe", "architectures": ["BailingMoeForCausalLM"]}
    (damaged / "config.json").write_text(json.dumps(config | named))
    with pytest.raises(ModelError, match=r"config\.json cannot be used: Ling 1 runs from a GGUF file"):
        load_model(damaged, progress=False)


def test_other_families_and_broken_files(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ModelError, match="unknown model type 'llama'"):
        load_model(damaged, progress=False)
    (damaged / "config.json").write_text(json.dumps(config | {"model_type": "longcat_flash"}))
    with pytest.raises(ModelError, match="model type 'longcat_flash' is not supported: some of its experts"):
        load_model(damaged, progress=False)
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged safetensors file"):
        load_model(damaged, progress=False)
