"""Checkpoints in FP8 with scaled blocks and in MXFP4: the model that their numbers say."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.weights import converted_experts
from hybrimoe_kt.weights.checkpoint import Checkpoint
from hybrimoe_kt.weights.gguf_file import GgufFile
from hybrimoe_kt.weights.packed_formats import mxfp4_blocks, q8_0_blocks, scaled

from . import llama_cpp_converter
from .families import random_model, save_checkpoint
from .stock import greedy, logits_of

PROMPT = random.Random(7).choices(range(250), k=23)
EXACT = {"cpu_backend": "torch_reference", "accelerator": "none"}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(autouse=True)
def kept_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hybrimoe_kt"


def fp8(values: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and scales of a matrix; the last blocks may be cut."""
    rows, columns = (-(-size // each) * each for size, each in zip(values.shape, block, strict=True))
    padded = torch.zeros(rows, columns)
    padded[: values.shape[0], : values.shape[1]] = values
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # [a, rows, b, columns]
    scales = tiles.abs().amax((1, 3)) / 448
    numbers = (tiles / scales[:, None, :, None]).flatten(2).flatten(0, 1)[: values.shape[0], : values.shape[1]]
    return numbers.to(torch.float8_e4m3fn).contiguous(), scales


def in_fp8(folder: Path, block: tuple[int, int], ending: str = "_scale_inv") -> torch.nn.Module:
    """Rewrite a checkpoint of qwen3moe; return the stock model of the numbers it then holds."""
    stock = random_model("qwen3moe")
    save_checkpoint("qwen3moe", stock, folder)
    tensors, plain = load_file(folder / "model.safetensors"), {}
    for name, values in list(tensors.items()):
        if name.endswith("_proj.weight"):
            tensors[name], scales = fp8(values, block)
            tensors[name + ending] = scales.view(()) if scales.numel() == 1 else scales
            plain[name] = scaled(tensors[name], scales, block)
        else:
            plain[name] = values
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    again = folder / "again"
    save_checkpoint("qwen3moe", stock, again)
    save_file(plain, again / "model.safetensors", metadata={"format": "pt"})
    return type(stock).from_pretrained(again, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("block", "ending"), [((128, 128), "_scale_inv"), ((512, 512), "_scale")], ids=["blocks", "one scale"]
)
def test_fp8_is_what_its_scales_say(tmp_path: Path, block: tuple[int, int], ending: str) -> None:
    stock = in_fp8(tmp_path, block, ending)
    ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    wanted = logits_of(stock, PROMPT)
    types = {m.type_name for layer in ours.runtime.store.layers.values() for m in layer.matrices}
    assert types == {"Q8_0"}
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(ours.model.get_parameter(name), stock.get_parameter(name)), "dense weights are exact"
    down, exact = ours.runtime.store.layers[1].down, stock.model.layers[1].mlp.experts.down_proj
    values = dequantize(down.data.numpy().reshape(8 * down.rows, -1), GGMLQuantizationType.Q8_0)
    blocks = exact.detach().reshape(-1, 32)
    error = (torch.from_numpy(values).view(-1, 32) - blocks).abs().amax(1)
    assert bool((error <= 0.51 * blocks.abs().amax(1) / 127).all()), "experts are rounded to 8 bits, no more"
    off = (logits_of(ours.model, PROMPT) - wanted).abs()  # a token whose experts are a close choice has others
    assert off.median() < 0.01 * wanted.std()


def test_fp8_is_converted_once(tmp_path: Path, kept_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp8(tmp_path, (128, 128))
    first = logits_of(load_model(tmp_path, option_overrides=EXACT, progress=False).model, PROMPT)
    kept = sorted(kept_in.glob("experts-*/layer-*.safetensors"))
    assert len(kept) == 3 and not list(kept_in.glob("experts-*/*.part"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert torch.equal(logits_of(load_model(tmp_path, option_overrides=EXACT, progress=False).model, PROMPT), first)
    assert [path.stat().st_mtime_ns for path in kept] == times
    kept[1].write_bytes(b"broken")
    assert torch.equal(logits_of(load_model(tmp_path, option_overrides=EXACT, progress=False).model, PROMPT), first)
    assert kept[1].stat().st_size == kept[0].stat().st_size, "what is damaged is made anew"
    (tmp_path / "model.safetensors").touch()
    load_model(tmp_path, option_overrides=EXACT, progress=False)
    assert len(list(kept_in.glob("experts-*"))) == 2, "of other files it says nothing"


def test_another_size_of_blocks_is_another_conversion(tmp_path: Path) -> None:
    """The same files under another configuration are other numbers, though there are as many scales."""
    in_fp8(tmp_path, (128, 128))
    config = json.loads((tmp_path / "config.json").read_text())

    def experts(rows: int) -> torch.Tensor:
        quantized = {"quant_method": "fp8", "weight_block_size": [rows, rows]}
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
        return load_model(tmp_path, option_overrides=EXACT, progress=False).runtime.store.layers[1].down.data.clone()

    wrong, right = experts(200), experts(128)
    assert not torch.equal(wrong, right)
    assert torch.equal(experts(200), wrong) and torch.equal(experts(128), right)


def test_a_conversion_that_is_interrupted_leaves_nothing(
    tmp_path: Path, kept_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp8(tmp_path, (128, 128))

    def interrupted(data: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(converted_experts, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_model(tmp_path, option_overrides=EXACT, progress=False)
    (folder,) = kept_in.glob("experts-*")
    assert list(folder.iterdir()) == []
    (folder / "layer-0-abc.99999999.part").write_bytes(b"of a process that is gone")
    load_model(tmp_path, option_overrides=EXACT, progress=False)
    assert not list(folder.glob("*.part")) and len(list(folder.glob("layer-*"))) == 3


def test_a_cache_that_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_fp8(tmp_path, (128, 128))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path, option_overrides=EXACT, progress=False)
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1


def test_a_scale_for_each_stacked_expert(tmp_path: Path) -> None:
    """As many experts as blocks of rows, so that the scales could be taken for those."""
    numbers = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    for shape in ((2,), (2, 1), (2, 1, 1)):
        scales = torch.tensor([0.5, 2.0]).view(shape)
        tensors = {"model.norm.weight": torch.ones(1), "experts.up": numbers, "experts.up_scale": scales}
        save_file(tensors, tmp_path / "model.safetensors")
        file = Checkpoint(tmp_path)
        for expert, factor in enumerate((0.5, 2.0)):
            assert torch.equal(file.read("experts.up", expert), numbers[expert].float() * factor)


def test_no_room_for_what_is_converted(
    tmp_path: Path, kept_in: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = in_fp8(tmp_path, (128, 128))
    usage: Any = type("usage", (), {"free": 10})
    monkeypatch.setattr(converted_experts.shutil, "disk_usage", lambda path: usage)
    with caplog.at_level(logging.WARNING):
        ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1
    assert not list(kept_in.glob("experts-*/layer-*"))
    wanted = logits_of(stock, PROMPT)
    assert (logits_of(ours.model, PROMPT) - wanted).abs().median() < 0.01 * wanted.std()


def test_scales_that_do_not_fit_are_named(tmp_path: Path) -> None:
    in_fp8(tmp_path, (128, 128))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.2.up_proj.weight_scale_inv"] = torch.ones(3, 5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.2\.up_proj\.weight is \[256, 256\] with \[3, 5\] scales"):
        load_model(tmp_path, option_overrides=EXACT, progress=False)


def in_mxfp4(folder: Path) -> torch.nn.Module:
    """Write gpt-oss as it is published; return the stock model of the same numbers."""
    stock = random_model("gpt-oss")
    save_checkpoint("gpt-oss", stock, folder)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(3)
    state = {name: value.float() for name, value in tensors.items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator).to(torch.uint8)
        exponents = torch.randint(121, 124, blocks.shape[:3], generator=generator).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        values = FP4[torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()]
        factors = torch.exp2(exponents.float() - 127)
        state[name] = (values * factors[..., None]).flatten(-2).transpose(1, 2).contiguous()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    written = (
        ', "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}'
    )
    (folder / "config.json").write_text(config + written)
    stock.load_state_dict(state, strict=True)
    return stock.eval()


def test_published_gpt_oss(tmp_path: Path) -> None:
    stock = in_mxfp4(tmp_path)
    wanted = logits_of(stock, PROMPT)
    for place in (EXACT, {**EXACT, "accelerator": "emulated", "cache_size": 3, "prefetch_size": 2}):
        ours = load_model(tmp_path, option_overrides=place, progress=False)
        experts = ours.runtime.store.layers[0]
        assert {matrix.type_name for matrix in experts.matrices} == {"MXFP4"} and len(experts.biases) == 3
        torch.testing.assert_close(logits_of(ours.model, PROMPT), wanted, rtol=0, atol=1e-4)
        assert greedy(ours.model, PROMPT, 12)[0] == greedy(stock, PROMPT, 12)[0]


def test_packed_experts_stand_as_llama_cpps_converter_writes_them(tmp_path: Path) -> None:
    root = llama_cpp_converter.find()
    if root is None:
        pytest.skip(llama_cpp_converter.MISSING)
    in_mxfp4(tmp_path)
    llama_cpp_converter.convert([tmp_path], root)
    file = GgufFile(tmp_path / "model.gguf")
    ours = load_model(tmp_path, option_overrides=EXACT, progress=False)
    for layer, experts in ours.runtime.store.layers.items():
        for name, tensor in experts.tensors.items():
            role, _, bias = name.partition("_")
            written = file.tensor(f"blk.{layer}.ffn_{role}_exps.{bias or 'weight'}")
            assert written.type_name == tensor.type_name
            assert torch.equal(written.values().flatten(), tensor.data.flatten()), name
    del ours
    (tmp_path / "model.safetensors").unlink()
    from_file = load_model(tmp_path / "model.gguf", option_overrides=EXACT, progress=False)
    assert not from_file.warnings


def test_a_missing_part_of_packed_experts_is_named(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is U8 \[8, 255, 8\], the configuration wants U8 \[8, 256, 8\]"):
        load_model(tmp_path, option_overrides=EXACT, progress=False)


@pytest.mark.parametrize("lacking", ["both", "down_proj"])
def test_a_layer_without_biases_is_not_another_form(tmp_path: Path, lacking: str) -> None:
    in_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("gate_up_proj", "down_proj") if lacking == "both" else (lacking,):
        del tensors[f"model.layers.1.mlp.experts.{name}_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.1\.mlp\.experts\.\w+_bias' is missing"):
        load_model(tmp_path, option_overrides=EXACT, progress=False)


def test_tensors_without_a_place_are_told(tmp_path: Path) -> None:
    save_checkpoint("qwen3moe", random_model("qwen3moe"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert load_model(tmp_path, option_overrides=EXACT, progress=False).warnings == []
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(256)
    tensors["model.layers.3.embed_tokens.weight"] = torch.ones(4)  # of a layer that only guesses
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (told,) = load_model(tmp_path, option_overrides=EXACT, progress=False).warnings
    assert "1 tensors have no place in this model" in told and "layers.1.self_attn.q_proj.bias" in told


def test_blocks_are_ggufs() -> None:
    random_numbers = np.random.default_rng(1)
    values = random_numbers.standard_normal((5, 96), dtype=np.float32)
    ours, theirs = q8_0_blocks(torch.from_numpy(values)).numpy(), quantize(values, GGMLQuantizationType.Q8_0)
    assert np.array_equal(ours.reshape(-1, 34)[:, :2], theirs.reshape(-1, 34)[:, :2]), "the same scales"
    errors = [np.abs(dequantize(blocks, GGMLQuantizationType.Q8_0) - values).sum() for blocks in (ours, theirs)]
    assert errors[0] <= errors[1] * 1.001
    numbers = torch.from_numpy(random_numbers.integers(0, 256, (4, 3, 16), dtype=np.uint8))
    exponents = torch.full((4, 3), 126, dtype=torch.uint8)
    blocks = mxfp4_blocks(numbers, exponents).reshape(4, -1)
    wanted = FP4[torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1).long()] / 2
    assert torch.equal(torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType.MXFP4)), wanted)


def test_scales_of_bare_names(tmp_path: Path) -> None:
    """DeepSeek-V4 calls a weight's scales by the same name, as powers of two, and has no prefix."""
    values = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    scales = torch.exp2(torch.randint(-3, 3, (2, 2), generator=torch.Generator().manual_seed(2)).float())
    numbers = values.to(torch.float8_e4m3fn)
    name = "layers.0.attn.wq_a"
    tensors = {
        "embed.weight": values, "norm.weight": values[0].clone(), "head.weight": values.bfloat16(),
        f"{name}.weight": numbers, f"{name}.scale": scales.to(torch.float8_e8m0fnu),
    }  # fmt: skip
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    file = Checkpoint(tmp_path)
    state = file.dense_state(torch.float32, (), lambda name: torch.device("cpu"))
    assert set(state) == {*tensors} - {f"{name}.scale"}
    assert torch.equal(state[f"{name}.weight"][...], scaled(numbers, scales, (128, 128)))
    assert torch.equal(file.read("head.weight"), values.bfloat16())
