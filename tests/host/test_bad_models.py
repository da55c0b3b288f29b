"""Files that cannot be run say why in one sentence; broken numbers never spread silently."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from hybrimoe_kt.backends.cpu_auto import _warn_once
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.errors import ConfigError, KernelError, ModelError
from hybrimoe_kt.host.hf.architectures import ARCHITECTURES
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.runtime import Routed
from hybrimoe_kt.weights.gguf_file import GgufFile
from hybrimoe_kt.weights.gguf_loader import GgufLoader
from tests.support.generated_model import GeneratedModel, Shape, Type, generate

Make = Callable[[Shape], GeneratedModel]


def gguf(path: Path, architecture: str, **metadata: int) -> Path:
    writer = GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unsupported_architecture_names_the_nearest(tmp_path: Path) -> None:
    valid = ", ".join(sorted(ARCHITECTURES))
    with pytest.raises(
        ModelError, match=rf"unknown architecture 'qwen4moe', did you mean 'qwen.moe'\? valid: {valid}$"
    ):
        load_model(gguf(tmp_path / "m.gguf", "qwen4moe"))


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="without experts"):
        load_model(gguf(tmp_path / "m.gguf", "qwen3moe", block_count=2))


def test_metadata_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"qwen3moe\.embedding_length is missing"):
        load_model(gguf(tmp_path / "m.gguf", "qwen3moe", expert_count=8, block_count=2))


def _configuration(model: GeneratedModel, folder: Path, **changes: object) -> Path:
    config = load_model(
        model.path, progress=False, option_overrides={"cpu_backend": "torch_reference"}
    ).model.config.to_dict()
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 512}, {"moe_intermediate_size": 128}, {"num_local_experts": 4}, {"vocab_size": 300}]
)
def test_shapes_that_contradict_the_configuration(generated: Make, tmp_path: Path, changes: dict[str, int]) -> None:
    model = generated(Shape())
    with pytest.raises(ModelError, match=r"has shape \[.*\], the configuration wants .* different models"):
        load_model(model.path, model_path=_configuration(model, tmp_path, **changes), progress=False)


def test_a_configuration_of_another_family(generated: Make, tmp_path: Path) -> None:
    folder = _configuration(generated(Shape()), tmp_path)
    with pytest.raises(ModelError, match="describes a qwen3_moe model"):
        load_model(generated(Shape(architecture="deepseek2", layers=2)).path, model_path=folder)


def test_a_configuration_directory_is_used(generated: Make, tmp_path: Path) -> None:
    model = generated(Shape())
    folder = _configuration(model, tmp_path, max_position_embeddings=77)
    assert load_model(model.path, model_path=folder, progress=False).model.config.max_position_embeddings == 77


WRONG_IN_KT_KERNEL = [
    (Shape(layers=1, types=(Type.BF16,) * 3), "BF16, which the llamafile CPU backend cannot run"),
    (Shape(layers=1, types=(Type.Q4_1,) * 3), "Q4_1, which the llamafile CPU backend cannot run"),
    (Shape(layers=1, hidden=320, types=(Type.Q8_0,) * 3), "hidden size 320 is not a multiple of 256"),
]
IDS = ["BF16", "Q4_1", "320 wide"]


@pytest.mark.parametrize(("shape", "reason"), WRONG_IN_KT_KERNEL, ids=IDS)
def test_experts_that_kt_kernel_gets_wrong(generated: Make, shape: Shape, reason: str) -> None:
    pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    with pytest.raises(ModelError, match=reason):
        load_model(generated(shape).path, progress=False, option_overrides={"cpu_backend": "llamafile"})


@pytest.mark.parametrize("shape", [shape for shape, _ in WRONG_IN_KT_KERNEL], ids=IDS)
def test_by_default_ggml_computes_them(
    generated: Make, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # without a calibration
    path = generated(shape).path
    token_ids = torch.tensor([[1, 2, 3]])
    found = load_model(path, progress=False)
    assert found.runtime.executor.cpu.describe() == "auto: ggml"
    reference = load_model(path, progress=False, option_overrides={"cpu_backend": "torch_reference"})
    logits, wanted = found.model(token_ids).logits, reference.model(token_ids).logits
    assert (logits - wanted).abs().max() < 0.05 * wanted.std()


def test_types_that_no_library_computes_go_to_plain_torch(
    generated: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # without a calibration
    monkeypatch.setitem(sys.modules, "libggml", None)
    monkeypatch.setattr("hybrimoe_kt.backends.ggml.library._opened", [])
    _warn_once.cache_clear()
    loaded = load_model(generated(WRONG_IN_KT_KERNEL[0][0]).path, progress=False)
    assert loaded.runtime.executor.cpu.describe() == "auto: torch_reference"
    (warning,) = [record.getMessage() for record in caplog.records if "many times slower" in record.getMessage()]
    assert "install it with `pip install libggml-python`" in warning
    assert torch.isfinite(loaded.model(torch.tensor([[1, 2, 3]])).logits).all()


def test_layers_cannot_differ_in_their_options(generated: Make, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    one = "- match: {{name: 'layers\\.{}\\.mlp\\.experts$'}}\n  replace:\n"
    one += "    class: hybrimoe_kt.operators.experts.HybriMoEExperts\n"
    rules.write_text(one.format(0) + one.format(1) + "    kwargs: {policy: lru}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="differ from an earlier layer's"):
        load_model(generated(Shape()).path, rules_path=rules)


def test_old_files_with_a_tensor_per_expert(generated: Make) -> None:
    """Their experts are copied together once, however often the rules are applied; unlike ones are refused."""
    loader = GgufLoader(GgufFile(generated(Shape(architecture="llama", head_dim=64, expert_tensors=True)).path))
    sizes = {"num_experts": 8, "top_k": 2, "hidden": 256, "inter": 256}
    first, second = (loader.layer_experts(0, **sizes) for _ in range(2))
    assert first.gate.data.data_ptr() == second.gate.data.data_ptr()
    one = loader.file.tensor("blk.1.ffn_up.3.weight")
    loader.file.tensors[one.name] = dataclasses.replace(one, ggml_type=int(Type.F16))
    with pytest.raises(ModelError, match=r"ffn_up\.3\.weight is F16 .* must be alike"):
        loader.layer_experts(1, **sizes)


@pytest.mark.parametrize("backend", ["torch_reference", "llamafile", "ggml"])
def test_nan_in_hidden_states_is_reported(generated: Make, backend: str) -> None:
    if backend == "llamafile":
        pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    loaded = load_model(generated(Shape()).path, progress=False, option_overrides={"cpu_backend": backend})
    choice = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
    hidden = torch.zeros(1, 256)
    hidden[0, 17] = float("nan")
    with pytest.raises(KernelError, match="experts of layer 1 are not finite"):
        loaded.runtime.run(1, Routed(hidden, *choice))
    finite = loaded.runtime.run(1, Routed(torch.ones(1, 256), *choice))
    assert torch.isfinite(finite).all(), "the runtime must go on after a refused step"


def test_nan_in_the_weights_is_reported(tmp_path: Path) -> None:
    model = generate(Shape(layers=1), tmp_path / "m.gguf", keep_state=False)
    data = np.fromfile(model.path, np.uint8)
    where = data.tobytes().index(bytes(GgufFile(model.path).tensor("output_norm.weight").data[:64]))
    data[where : where + 4] = np.array([np.nan], np.float32).view(np.uint8)
    data.tofile(model.path)
    engine = build_engine(model.path, progress=False, option_overrides={"cpu_backend": "torch_reference"})
    with pytest.raises(KernelError, match="NaN or infinite logits"):
        list(engine.tokens([1, 2, 3], Sampling(max_new_tokens=4)))


def test_a_split_model_equals_the_whole(generated: Make, tmp_path: Path) -> None:
    """Splits as llama.cpp writes them: tensors spread over files, metadata in the first."""
    whole = GgufFile(generated(Shape()).path)
    _split(whole, tmp_path)
    for path in (tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf", tmp_path):
        split = GgufFile(path)
        assert split.tensors.keys() == whole.tensors.keys()
        assert all(np.array_equal(split.tensors[name].data, tensor.data) for name, tensor in whole.tensors.items())
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match=r"1 of 2 splits missing, first 'm-00002-of-00002\.gguf'"):
        GgufFile(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="one split of 2"):
        GgufFile(tmp_path / "m.gguf")


def _split(whole: GgufFile, folder: Path) -> None:
    names = sorted(whole.tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        writer = GGUFWriter(str(folder / f"m-{number + 1:05d}-of-00002.gguf"), whole.architecture)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for name in part:
            tensor = whole.tensors[name]
            raw = np.array(tensor.data).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(name, raw, raw_dtype=Type(tensor.ggml_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _with_metadata(whole: GgufFile, path: Path, changes: dict[str, object]) -> Path:
    """Write the model again with some metadata replaced; None drops a key."""
    writer = GGUFWriter(str(path), whole.architecture)
    for key, value in (whole.metadata | changes).items():
        if key == "general.architecture" or value is None:
            continue
        add = writer.add_array if isinstance(value, list) else _ADD[type(value)].__get__(writer)
        add(key, value)
    for tensor in whole.tensors.values():
        raw = np.array(tensor.data).reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(tensor.name, raw, raw_dtype=Type(tensor.ggml_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_ADD = {int: GGUFWriter.add_int64, float: GGUFWriter.add_float64, str: GGUFWriter.add_string, bool: GGUFWriter.add_bool}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qwen3moe.block_count": 1}, "holds 2 layers, its metadata says 1"),
        ({"qwen3moe.block_count": 2**31 - 1}, "holds 2 layers"),
        ({"qwen3moe.block_count": None}, "block_count is missing"),
        ({"qwen3moe.block_count": "two"}, "block_count is 'two', not a number"),
        ({"qwen3moe.expert_used_count": 0}, "to 0 of 8 experts"),
        ({"qwen3moe.expert_used_count": 9}, "to 9 of 8 experts"),
        ({"qwen3moe.attention.head_count": 0}, "model"),
        ({"qwen3moe.attention.head_count": [4, 2]}, "differs from layer to layer"),
        ({"qwen3moe.embedding_length": -256}, "model"),
        ({"qwen3moe.rope.dimension_count": 2**31}, "2147483648 dimensions of heads of 32 cannot be rotated"),
        ({"qwen3moe.rope.dimension_count": 0}, "0 dimensions of heads of 32 cannot be rotated"),
        ({"qwen3moe.rope.freq_base": "fast"}, "freq_base is 'fast', not a number"),
    ],
    ids=str,
)
def test_metadata_that_contradicts_the_tensors(
    generated: Make, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = _with_metadata(GgufFile(generated(Shape()).path), tmp_path / "m.gguf", changes)
    with pytest.raises(ModelError, match=message):
        load_model(path, progress=False, option_overrides={"cpu_backend": "torch_reference"})


def test_metadata_written_again_is_the_same_model(generated: Make, tmp_path: Path) -> None:
    """Guards the test above: without changes the rewritten file loads."""
    path = _with_metadata(GgufFile(generated(Shape()).path), tmp_path / "m.gguf", {})
    assert load_model(path, progress=False, option_overrides={"cpu_backend": "torch_reference"}).model is not None


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"num_experts_per_tok": 3}])
def test_a_configuration_that_would_run_another_model(generated: Make, tmp_path: Path, changes: dict[str, int]) -> None:
    model = generated(Shape())
    with pytest.raises(ModelError, match="its configuration says"):
        load_model(model.path, model_path=_configuration(model, tmp_path, **changes), progress=False)


def test_a_configurations_own_quantisation_is_not_the_files(generated: Make, tmp_path: Path) -> None:
    model = generated(Shape())
    folder = _configuration(model, tmp_path, quantization_config={"quant_method": "fp8", "fmt": "e4m3"})
    assert load_model(model.path, model_path=folder, progress=False).model is not None


@pytest.mark.parametrize("name", ["mlp$", r"self_attn$", r"mlp\.gate$"])
def test_the_experts_operator_on_another_module(generated: Make, tmp_path: Path, name: str) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        f"- match: {{name: '{name}'}}\n  replace: {{class: hybrimoe_kt.operators.experts.HybriMoEExperts}}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="replaces a layer's routed experts"):
        load_model(generated(Shape()).path, rules_path=rules, progress=False)


@pytest.mark.parametrize("alignment", [0, 7, "wide"])
def test_an_alignment_that_cannot_be(tiny_model: Path, tmp_path: Path, alignment: object) -> None:
    path = _with_metadata(GgufFile(tiny_model), tmp_path / "m.gguf", {"general.alignment": alignment})
    with pytest.raises(ModelError, match=r"general\.alignment is"):
        GgufFile(path)


def test_an_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile("x" * 5000)
    (tmp_path / "x.gguf").mkdir()
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        GgufFile(tmp_path)
