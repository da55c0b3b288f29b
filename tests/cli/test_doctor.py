"""`hybrimoe doctor`: its facts, its verdict when something is missing, and how it looks."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from hybrimoe_kt.backends import kt_kernel_pool
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.cli import doctor, tools
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.device.calibrate import machine_name, profile_path
from hybrimoe_kt.errors import HostCompatibilityError, ModelError
from hybrimoe_kt.host.doctor import machine as machine_report
from hybrimoe_kt.runtime.assembly import make_cpu_backend
from tests.cli.doctor_machine import GPU, devices, no_profile_no_gpu, report, with_gpu

__all__ = ["no_profile_no_gpu", "with_gpu"]  # fixtures

Type = GGMLQuantizationType


@pytest.fixture
def without_kt_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "kt_kernel", None)
    kt_kernel_pool.extension.cache_clear()
    yield
    kt_kernel_pool.extension.cache_clear()


@pytest.fixture
def without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libggml", None)
    monkeypatch.setattr(ggml, "_opened", [])


@pytest.fixture
def with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml is there anyhow; of kt-kernel nothing is called."""
    monkeypatch.setattr(kt_kernel_pool, "unusable", lambda: None)


def write_model(path: Path, *layers: tuple[Type, Type, Type], hidden: int = 256, inter: int = 512) -> str:
    """A header as of a Mixture-of-Experts model, its layers' gate, up and down experts of the given types."""
    writer = GGUFWriter(str(path), "qwen3moe")
    writer.add_block_count(len(layers))
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((16, hidden), np.float32))
    for number, types in enumerate(layers):
        sizes = {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}
        for (role, (rows, columns)), kind in zip(sizes.items(), types, strict=True):
            block, num_bytes = GGML_QUANT_SIZES[kind]
            data = np.zeros((4, rows, columns // block * num_bytes), np.uint8)
            writer.add_tensor(f"blk.{number}.ffn_{role}_exps.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_json_has_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert found.keys() == {
        "hybrimoe_kt", "python", "cpu", "memory", "accelerators", "libraries", "cpu_kernels", "gpu_kernels",
        "attention", "profile", "last_runs", "model", "verdict",
    }  # fmt: skip
    assert found["cpu"]["model"] and found["cpu"]["physical_cores"] >= 1
    assert set(machine_report._CPU) | {"problem"} == found["cpu"].keys()
    assert set(machine_report._MEMORY) | {"problem"} == found["memory"].keys()
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert found["memory"]["page_lock_unlimited"] or found["memory"]["page_lock_limit_bytes"] >= 0
    libraries = {"torch", "transformers", "gguf", "libggml-python", "kt-kernel", "triton", "flashinfer-python"}
    assert found["libraries"].keys() == libraries
    assert all(found["libraries"][name]["version"] for name in ("torch", "transformers", "gguf"))
    kernels = found["cpu_kernels"]
    assert kernels.keys() == {"runs", "types", "problem", "ggml", "kt-kernel", "keeps_dense_packed", "auto"}
    assert {"Q4_K", "Q8_0", "IQ4_XS", "MXFP4", "Q5_1"} <= set(kernels["types"]) & set(kernels["ggml"]["types"])
    assert kernels["ggml"]["version"].startswith("0.") and Path(kernels["ggml"]["file"]).exists()
    assert isinstance(kernels["ggml"]["instructions"], list) and kernels["keeps_dense_packed"]
    assert found["profile"]["path"].endswith(".json") and not found["profile"]["measured"]
    assert found["last_runs"] == {}
    assert found["model"] is None
    assert found["verdict"].keys() == {"ready", "text", "next", "findings"}


def test_who_attends_in_captured_steps_is_told_with_the_reasons_against_better(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = report(capsys)["attention"]
    better = dict.fromkeys(("flashinfer", "triton"), "on the CPU torch attends")
    assert found == {"devices": [{"device": "cpu", "takes": "sdpa", "better": better}], "problem": None}
    assert doctor._attention_row(found) == "sdpa on cpu (on the CPU torch attends)"
    cards = [
        {"device": "cuda:0", "takes": "triton", "better": {"flashinfer": "FlashInfer is not installed"}},
        {"device": "cuda:1", "takes": "flashinfer", "better": {}},
    ]
    told = doctor._attention_row({"devices": cards, "problem": None})
    assert told == "triton on cuda:0 (FlashInfer is not installed), flashinfer on cuda:1"
    assert doctor._attention_row({"devices": [], "problem": "no torch"}) == "not known: no torch"


def test_a_machine_without_a_gpu_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kt_kernel")
    verdict = report(capsys)["verdict"]
    assert verdict == {
        "ready": True,
        "text": "ready: all experts on the CPU, no accelerator here",
        "next": "ktransformers",
        "findings": [],
    }


@pytest.mark.usefixtures("without_kt_kernel")
def test_a_missing_kt_kernel(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    found = report(capsys, "--model", str(embedded_model))
    kernels = found["cpu_kernels"]
    assert kernels["runs"] and kernels["problem"] is None
    assert not kernels["kt-kernel"]["runs"] and "needs kt-kernel 0.7.2" in kernels["kt-kernel"]["problem"]
    assert kernels["kt-kernel"]["types"] == [] and found["libraries"]["kt-kernel"]["version"] is None
    chosen = {"takes": "ggml", "measured": False, "reason": "kt-kernel does not run here", "problem": None}
    assert kernels["auto"] == chosen
    assert found["model"]["kinds"][0]["tensors"][0]["cpu_kernel"] == "ggml"
    assert found["verdict"]["ready"] and found["verdict"]["findings"] == []


@pytest.mark.usefixtures("without_kt_kernel")
@pytest.mark.parametrize(
    ("machine", "said"), [("x86_64", "not installed, optional"), ("aarch64", "no build for this machine or Python")]
)
def test_nobody_misses_kt_kernel(
    machine: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_report.platform, "machine", lambda: machine)
    monkeypatch.setattr(machine_report.platform, "python_version", lambda: "3.11.9")
    assert doctor.main([]) == 0
    shown = capsys.readouterr().out
    assert said in shown and "missing" not in shown and "llamafile" not in shown


@pytest.mark.usefixtures("without_ggml", "with_both")
def test_a_missing_ggml(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    found = report(capsys, "--model", str(embedded_model))
    kernels = found["cpu_kernels"]
    assert kernels["runs"] and not kernels["ggml"]["runs"] and not kernels["keeps_dense_packed"]
    assert "needs the package libggml-python" in kernels["ggml"]["problem"]
    assert "IQ4_XS" not in kernels["types"] and "Q4_K" in kernels["types"]
    assert kernels["auto"]["takes"] == "llamafile" and kernels["auto"]["reason"] == "ggml does not run here"
    assert found["model"]["kinds"][0]["tensors"][0]["cpu_kernel"] == "llamafile"
    assert found["model"]["dense_dtype"] == "float32"
    verdict = found["verdict"]
    assert (
        verdict["ready"] and "ggml, which computes experts and dense weights on the CPU, is missing" in verdict["text"]
    )
    assert verdict["next"].startswith("pip install ") and "libggml-python" in verdict["next"]


@pytest.mark.usefixtures("without_ggml", "without_kt_kernel")
def test_no_library_for_the_cpu(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    found = report(capsys, "--model", str(embedded_model))
    kernels = found["cpu_kernels"]
    assert not kernels["runs"] and kernels["types"] == []
    assert "libggml-python" in kernels["problem"] and "needs kt-kernel 0.7.2" in kernels["problem"]
    assert kernels["auto"]["takes"] == "torch_reference"
    assert found["model"]["kinds"][0]["tensors"][0]["cpu_kernel"] == "torch_reference"
    assert not found["verdict"]["ready"] and "ggml" in found["verdict"]["text"]
    assert "libggml-python" in found["verdict"]["next"]


@pytest.mark.usefixtures("with_both")
def test_a_ggml_of_an_unknown_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Path:
        raise HostCompatibilityError("libggml-base.so is ggml 1.2.0; 0.15 to 1.0 are known here")

    monkeypatch.setattr(ggml, "_opened", [])
    monkeypatch.setattr(ggml, "_packaged", refuse)
    verdict = report(capsys)["verdict"]
    assert verdict["ready"] and "ggml does not run: libggml-base.so is ggml 1.2.0" in verdict["text"]
    assert "libggml-python" in verdict["next"]


def measured(capsys: pytest.CaptureFixture[str], **backends: dict[str, float]) -> None:
    """Keep a profile of this machine in which these CPU backends were compared."""
    path = profile_path(report(capsys)["profile"]["machine"])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = resources.files("hybrimoe_kt.profiles").joinpath("cpu-only.json").read_text()
    path.write_text(json.dumps(json.loads(text) | {"cpu_backends": backends}))


@pytest.mark.usefixtures("with_both")
def test_what_auto_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    auto = report(capsys)["cpu_kernels"]["auto"]
    assert auto["takes"] == "ggml" and not auto["measured"] and "hybrimoe calibrate" in auto["reason"]
    loads = ("1", "2", "8", "32", "128")
    measured(
        capsys,
        ggml=dict.fromkeys(loads, 1.0),
        llamafile=dict(zip(loads, (2.0, 2.0, 0.5, 0.5, 2.0), strict=True)),
    )
    file = write_model(tmp_path / "m.gguf", (Type.Q8_0,) * 3, (Type.IQ4_XS,) * 3, inter=512)
    found = report(capsys, "--model", file)
    auto = found["cpu_kernels"]["auto"]
    assert auto["takes"] == "ggml up to 7 tokens an expert, llamafile up to 127, ggml from 128"
    assert auto["measured"] and auto["reason"].startswith("as measured on 20")
    kernels = [kind["tensors"][0]["cpu_kernel"] for kind in found["model"]["kinds"]]
    assert kernels == [auto["takes"], "ggml"]  # kt-kernel does not compute the second


@pytest.mark.parametrize("beside_accelerator", [False, True])
def test_a_profile_is_looked_up_as_a_run_does(
    beside_accelerator: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(describe=lambda: "a card") if beside_accelerator else None
    monkeypatch.setattr("hybrimoe_kt.device.choose.choose_accelerator", lambda name: card)
    backend = make_cpu_backend(ExpertOptions(), beside_accelerator=beside_accelerator)
    assert report(capsys)["profile"]["machine"] == machine_name(card, backend)  # type: ignore[arg-type]


def test_a_missing_triton(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("kt_kernel")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert report(capsys)["verdict"]["findings"] == []  # nothing would use it
    devices(monkeypatch, GPU)
    found = report(capsys)
    assert found["libraries"]["triton"] == {"version": None, "wanted": None, "problem": "not installed"}
    assert found["gpu_kernels"]["problem"] == "Triton is not installed (pip install triton)"
    assert found["verdict"]["ready"] and "several times slower" in found["verdict"]["text"]
    assert found["verdict"]["next"] == "pip install triton"


def test_how_dense_weights_are_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        doctor.main([])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "dense weights" in line]
        return " ".join(line.strip("│ ").split("│")[1].split())

    monkeypatch.setenv("COLUMNS", "200")
    assert said() == "as in the file on the CPU"
    devices(monkeypatch, GPU)
    assert said() == "as in the file on the CPU, floats on the GPU"
    monkeypatch.setattr(TritonGpu, "unusable", lambda device: None)
    assert said() == "as in the file on the CPU, as in the file on the GPU"


@pytest.mark.parametrize("name", ["transformers", "gguf", "torch"])
def test_a_missing_library_of_ours(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    found = report(capsys)
    assert found["libraries"][name]["problem"] == "not installed"
    assert found["verdict"]["text"] == f"not ready: {name} is not installed"
    assert found["verdict"]["next"].startswith("pip install") and name in found["verdict"]["next"]


def test_probes_that_break_are_rows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, Any]:
        raise OSError("libcudart.so.12: cannot open shared object file\nmore")

    for probe in ("inspect_cpu", "inspect_memory", "inspect_accelerators"):
        monkeypatch.setattr(machine_report, probe, broken)
    monkeypatch.setattr(kt_kernel_pool, "unusable", broken)
    assert doctor.main([]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert shown.count("OSError: libcudart.so.12: cannot open shared object file") == 5  # four rows and the verdict
    assert "not ready: torch cannot be imported (OSError: libcudart.so.12" in shown


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_is_to_be_measured_first(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    pytest.importorskip("kt_kernel")
    found = report(capsys, "--model", str(embedded_model))
    assert found["verdict"]["text"] == "ready, but this machine has not been measured yet"
    assert found["verdict"]["next"] == f"hybrimoe calibrate --model {embedded_model}"
    gate = found["model"]["kinds"][0]["tensors"][0]
    assert gate["gpu_decode_kernel"].startswith("decode_gate_up (sm_86")
    assert found["model"]["dense_dtype"] == "as in the file" and found["model"]["dense_on"] == "cuda:0"
    assert found["model"]["fits_accelerator"] and found["model"]["accelerator_expert_share"] == 1.0


@pytest.mark.usefixtures("with_gpu")
def test_a_measured_machine(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("kt_kernel")
    path = profile_path(report(capsys)["profile"]["machine"])
    path.parent.mkdir(parents=True)
    path.write_text(resources.files("hybrimoe_kt.profiles").joinpath("default.json").read_text())
    found = report(capsys)
    assert found["profile"]["measured"] and found["profile"]["date"].startswith("20")
    assert found["verdict"]["text"] == "ready: experts on cuda:0 and the CPU"
    path.write_text("{")
    found = report(capsys)
    assert "not JSON" in found["profile"]["problem"]
    assert found["verdict"]["next"] == "hybrimoe calibrate"


def test_a_driver_that_this_torch_cannot_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kt_kernel")
    devices(monkeypatch, driver=True)
    verdict = report(capsys)["verdict"]
    assert verdict["ready"] and verdict["next"] == "pip install '.[cuda]'"


def test_kernels_of_the_embedded_model(capsys: pytest.CaptureFixture[str], embedded_model: Path) -> None:
    pytest.importorskip("kt_kernel")
    found = report(capsys, "--model", str(embedded_model))
    (kind,) = found["model"]["kinds"]
    assert kind["layers"] == list(range(5)) and kind["gpu_is_assumed"]
    rows = {row["tensor"]: row for row in kind["tensors"]}
    assert rows.keys() == {"gate", "up", "down"}
    assert {row["cpu_kernel"] for row in rows.values()} == {"ggml"}
    assert found["model"]["dense_dtype"] == "as in the file"
    assert {row["type"] for row in rows.values()} == {"Q4_K"}
    assert rows["up"]["gpu_decode_kernel"].startswith("decode_gate_up")
    assert rows["down"]["gpu_prefill_kernel"].startswith("prefill_down")
    assert found["model"]["expert_bytes"] == 5 * 32 * 3 * 256 * 144
    assert found["model"]["fits_host"]
    assert found["verdict"]["next"] == f"ktransformers --gguf_path {embedded_model}"


@pytest.mark.usefixtures("with_gpu")
def test_layers_that_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("kt_kernel")
    small, large = (Type.Q4_K,) * 3, (Type.Q4_K, Type.Q4_K, Type.Q6_K)
    file = write_model(tmp_path / "my model.gguf", large, small, large, (Type.TQ2_0,) * 3)
    found = report(capsys, "--model", file)
    kinds = found["model"]["kinds"]
    assert [kind["layers"] for kind in kinds] == [[0, 2], [1], [3]]
    assert [kind["tensors"][2]["type"] for kind in kinds] == ["Q6_K", "Q4_K", "TQ2_0"]
    assert kinds[2]["gpu_refusal"] == "gate experts are TQ2_0, which no GPU kernel reads"
    assert kinds[2]["tensors"][0]["gpu_decode_kernel"] is None
    assert 0.7 < found["model"]["accelerator_expert_share"] < 0.9
    assert "1 layer stays on the CPU: gate experts are TQ2_0" in found["verdict"]["text"]
    assert doctor.main(["--model", file]) == 0
    shown = capsys.readouterr().out
    assert "layers 0, 2 " in shown
    assert "layer 1 " in shown and "none, they stay on the CPU" in shown and "because gate experts are TQ2_0" in shown
    assert f"next: hybrimoe calibrate --model '{file}'\n" in shown


REFUSED_BY_KT_KERNEL = (Type.IQ4_XS, Type.MXFP4, Type.Q5_1)


@pytest.mark.parametrize("kind", REFUSED_BY_KT_KERNEL, ids=lambda kind: kind.name)
def test_types_that_ggml_alone_computes(kind: Type, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = report(capsys, "--model", write_model(tmp_path / "m.gguf", (kind,) * 3))
    judged = found["model"]["kinds"][0]
    assert {row["cpu_kernel"] for row in judged["tensors"]} == {"ggml"} and judged["cpu_refusal"] is None
    assert found["verdict"]["ready"]


@pytest.mark.usefixtures("without_ggml", "with_both")
@pytest.mark.parametrize("kind", REFUSED_BY_KT_KERNEL, ids=lambda kind: kind.name)
def test_types_that_no_library_computes(kind: Type, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", (kind,) * 3)
    found = report(capsys, "--model", file)
    assert found["model"]["kinds"][0]["tensors"][0]["cpu_kernel"] == "torch_reference"
    assert not found["verdict"]["ready"]
    assert f"gate experts are {kind.name}, which the llamafile CPU backend cannot run" in found["verdict"]["text"]
    assert found["verdict"]["next"].startswith("pip install ") and "libggml-python" in found["verdict"]["next"]
    assert doctor.main(["--model", file]) == 0
    assert "torch_reference" in capsys.readouterr().out


def test_memory_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, embedded_model: Path
) -> None:
    pytest.importorskip("kt_kernel")
    memory = machine_report.inspect_memory()
    monkeypatch.setattr(machine_report, "inspect_memory", lambda: memory | {"available_bytes": 19_000_000})
    found = report(capsys, "--model", str(embedded_model))
    assert found["model"]["fits_host"] is False
    assert "takes 19.1 MiB of memory" in found["verdict"]["text"] and found["verdict"]["ready"]
    monkeypatch.setattr(machine_report, "inspect_memory", lambda: memory | {"available_bytes": 1_000_000})
    assert not report(capsys, "--model", str(embedded_model))["verdict"]["ready"]


def test_a_file_that_is_no_model_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "notes.gguf"
    file.write_text("not a model, but long enough to be read")
    with pytest.raises(ModelError, match="not a GGUF file"):
        doctor.main(["--model", str(file)])
    assert tools.main(["doctor", "--model", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "not a GGUF file" in said.err
    assert tools.main(["doctor", "--model", str(tmp_path / "none.gguf")]) == 2


@pytest.mark.parametrize("gpu", [False, True])
def test_tables_fit_80_columns(
    gpu: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, embedded_model: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if gpu:
        devices(monkeypatch, GPU)
        monkeypatch.setattr(TritonGpu, "unusable", lambda device: None)
    assert doctor.main(["--model", str(embedded_model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("next: "))
    assert lines[-1].startswith("next: ")
    assert ("A [test] GPU" in "".join(lines)) is gpu


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        doctor.main(["--help"])
    assert exit_code.value.code == 0
    assert "hybrimoe doctor --model" in capsys.readouterr().out


@pytest.mark.parametrize("inter", [512, 384])
def test_ggml_reads_experts_of_any_width_in_place(
    inter: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write_model(tmp_path / "m.gguf", (Type.Q8_0, Type.Q8_0, Type.Q8_0), inter=inter)
    model = report(capsys, "--model", file)["model"]
    assert model["host_bytes"] == model["expert_bytes"] + model["dense_bytes"]
    devices(monkeypatch, GPU)
    model = report(capsys, "--model", file)["model"]
    assert model["host_bytes"] == model["expert_bytes"]


@pytest.mark.usefixtures("without_ggml", "with_both")
@pytest.mark.parametrize(("inter", "copies"), [(512, 1), (384, 512 / 384)], ids=["in place", "padded"])
def test_host_memory_of_experts_without_ggml(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inter: int, copies: float
) -> None:
    """A CPU that reads a padded copy wants it instead of the file's pages; a GPU's transfers want those, too."""
    file = write_model(tmp_path / "m.gguf", (Type.Q8_0, Type.Q8_0, Type.Q8_0), inter=inter)
    model = report(capsys, "--model", file)["model"]
    assert model["host_bytes"] == int(copies * model["expert_bytes"]) + model["dense_bytes"]
    devices(monkeypatch, GPU)
    model = report(capsys, "--model", file)["model"]
    assert model["host_bytes"] == model["expert_bytes"] + (int(copies * model["expert_bytes"]) if copies > 1 else 0)
