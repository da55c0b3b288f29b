"""Which ggml is computed with: the packaged one, another that is named, or none, which costs speed alone."""

from __future__ import annotations

import ctypes.util
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.cpu_ggml import GgmlBackend
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError, ModelError
from hybrimoe_kt.operators.linear import QuantizedLinear
from tests.support.expert_layers import layer

ROOT = Path(__file__).parents[2]
needs_ggml = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been computed with any library yet."""
    monkeypatch.setattr(ggml, "_opened", [])


@pytest.fixture
def missing(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libggml", None)


def packaged() -> Path:
    spec = importlib.util.find_spec("libggml")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.mark.usefixtures("missing")
def test_without_the_package_one_sentence_says_what_to_install() -> None:
    reason = GgmlBackend.unusable()
    assert reason is not None and "pip install libggml-python" in reason and "\n" not in reason
    assert GgmlBackend.types() == ()
    assert "ggml's CPU kernels do not compute" in (GgmlBackend.refuses(layer()) or "")
    with pytest.raises(ModelError):
        GgmlBackend.add_layer(SimpleNamespace(refuses=GgmlBackend.refuses), layer())  # type: ignore[arg-type]


@pytest.mark.usefixtures("missing")
def test_without_the_package_linear_layers_are_floats() -> None:
    """And nobody asks the file for blocks."""
    stock = torch.nn.Linear(64, 5)
    ours = QuantizedLinear("model.q_proj", None, None, stock)
    given = torch.randn(2, 3, 64)
    assert torch.equal(ours(given), stock(given))
    assert dict(ours.named_parameters()).keys() == {"weight", "bias"}


@needs_ggml
def test_on_other_devices_and_by_wish_linear_layers_are_floats() -> None:
    for place in ({"generate_device": "cuda:0"}, {"generate_device": "meta"}, {"cpu": "float"}):
        stock = torch.nn.Linear(64, 5)
        assert QuantizedLinear("model.q_proj", None, None, stock, **place).weight is stock.weight
    with pytest.raises(ConfigError, match="unknown cpu 'gmml', did you mean 'ggml'"):
        QuantizedLinear("model.q_proj", None, None, torch.nn.Linear(64, 5), cpu="gmml")
    with pytest.raises(ConfigError, match="unknown cpu 'gmml'"):
        QuantizedLinear.check_kwargs({"cpu": "gmml"})
    with pytest.raises(ConfigError, match=r"replaces torch\.nn\.Linear, found Embedding"):
        QuantizedLinear("model.q_proj", None, None, torch.nn.Embedding(2, 2))


@needs_ggml
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["", "lib64", "lib64/.."])
def test_a_directory_may_be_named(name: str) -> None:
    ggml.choose_library(str(packaged() / name))
    assert ggml.library().named == str(packaged() / name)
    assert "Q4_K" in {row.name for row in ggml.library().types}


@needs_ggml
@pytest.mark.usefixtures("fresh")
def test_one_library_a_process() -> None:
    first = ggml.library()
    ggml.choose_library("")  # whichever there is
    with pytest.raises(HostCompatibilityError, match=f"computes with {first.file} already; name it first"):
        ggml.choose_library(str(packaged()))
    assert ggml.library() is first


def _nowhere(folder: Path) -> Path:
    return folder / "nowhere"


def _text(folder: Path) -> Path:
    file = folder / "libggml.so"
    file.write_text("not a library")
    return file


def _empty(folder: Path) -> Path:
    return folder


def _half(folder: Path) -> Path:
    (folder / "lib").mkdir()
    (folder / "lib" / "libggml-base.so.0").write_bytes(b"")
    return folder


def _another(folder: Path) -> Path:
    """A library, but of other functions."""
    name = ctypes.util.find_library("m")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        found = next((line.split()[-1] for line in maps if "/libm" in line and ".so" in line), name)
    if found is None or not Path(found).is_file():
        pytest.skip("no library is known to lie anywhere")
    return Path(found)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_nowhere, "nowhere is no ggml library, nor a directory with libggml-base"),
        (_text, r"libggml\.so cannot be loaded: "),
        (_empty, "is no ggml library, nor a directory with libggml-base"),
        (_half, r"lib has libggml-base\.so\.0 but no libggml-cpu"),
        (_another, "has no ggml_version; libggml-python 0.20.2 has"),
    ],
    ids=["nowhere", "no library", "empty directory", "no CPU part", "another library"],
)
def test_what_is_no_ggml_is_told_in_a_sentence(made: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(HostCompatibilityError, match=message) as caught:
        ggml.choose_library(str(made(tmp_path)))
    assert "\n" not in str(caught.value)
    assert not ggml._opened, "the packaged one may still be used"


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.14.9", False), ("0.15.0", True), ("0.99.1-dev", True), ("1.0.0", False), ("", False), ("b4242", False)],
)
def test_versions_that_nobody_compared_are_refused(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml.Library, "_check_layout", lambda self: None)
    functions: dict[str, Any] = {name: SimpleNamespace() for name in ggml._FUNCTIONS}

    def tell() -> bytes:
        return version.encode()

    handle = SimpleNamespace(**functions | {"ggml_version": tell, "ggml_cpu_init": lambda: None})
    if fits:
        assert ggml.Library([handle], "file", "").version == version  # type: ignore[list-item]
    else:
        with pytest.raises(HostCompatibilityError, match=r"file is ggml .*; 0\.15 to 1\.0 are known here"):
            ggml.Library([handle], "file", "")  # type: ignore[list-item]


@needs_ggml
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("word", "place"), [("DATA", 30), ("SIZES", 3), ("STRIDES", 5)])
def test_another_layout_of_tensors_is_refused(word: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, word, place)
    assert "lays out tensors in an unknown way" in (ggml.unusable() or "")


_OTHER = """
import sys, torch
from hybrimoe_kt.backends.cpu_ggml import GgmlBackend
from hybrimoe_kt.backends.ggml.library import choose_library, library
from tests.support.expert_layers import answers, layer, reference, step

choose_library(sys.argv[1])
from tests.support.random_blocks import Type
for kind in (Type.Q4_K, Type.MXFP4, Type.IQ4_NL):
    experts, inputs = layer(kind, inter=96 if kind != Type.Q4_K else 256), step(5)
    backend = GgmlBackend(2, 32)
    backend.add_layer(experts)
    wanted = reference(experts, *inputs)
    assert (answers(backend, experts, *inputs) - wanted).norm() < 0.035 * wanted.norm()
assert library().file == sys.argv[1]
print(library().version)
"""


@needs_ggml
def test_llama_cpp_s_own_library_may_be_named() -> None:
    """One file that has everything: the module of xllamacpp."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("xllamacpp (test extra) is not installed")
    file = next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"), None)
    if file is None:
        pytest.skip("this xllamacpp is no shared library")
    command = [sys.executable, "-c", _OTHER, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.")
