"""Damaged files: whatever a byte says, the answer is a model or a ModelError, and soon."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.architectures import architecture_of
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.host.hf.sources import _config
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import GeneratedModel, Shape, Type

MAPS = Path("/proc/self/maps")
REFERENCE = {"cpu_backend": "torch_reference"}


def test_flipped_bytes_in_the_header_never_crash(tiny_model: Path, tmp_path: Path) -> None:
    """150 files with one to three bytes changed in header, metadata and tensor table."""
    original, path = bytearray(tiny_model.read_bytes()), tmp_path / "damaged.gguf"
    path.write_bytes(original)
    chance, refused = random.Random(5), 0
    for _ in range(150):
        places = [chance.randrange(chance.choice([24, 1600, 131_300])) for _ in range(chance.randint(1, 3))]
        with path.open("r+b") as file:
            for place in places:
                file.seek(place)
                file.write(bytes([chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])]))
        try:
            damaged = GgufFile(path)
            _config(damaged, architecture_of(damaged), None)
        except ModelError:
            refused += 1
        with path.open("r+b") as file:
            for place in places:
                file.seek(place)
                file.write(bytes([original[place]]))
    assert 50 < refused < 150, "the damage should matter in many files, and not in all"


@pytest.mark.parametrize("length", [0, 3, 4, 23, 24, 100, 5_000, 100_000, 131_000])
def test_a_file_cut_anywhere_in_its_header(tiny_model: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_model.read_bytes()[:length])
    with pytest.raises(ModelError, match=r"not a GGUF file|truncated GGUF"):
        GgufFile(path)


def test_a_directory_with_two_models_asks_which(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(tiny_model.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"holds 2 models \(a\.gguf, b\.gguf\); name one file"):
        GgufFile(tmp_path)


@pytest.mark.skipif(not MAPS.exists(), reason="no /proc here")
def test_the_mapping_is_shared_and_read_only(tiny_model: Path) -> None:
    """What page-locks a private mapping in place would copy each of its pages."""
    file = GgufFile(tiny_model)
    at = file.tensor("output_norm.weight").data.ctypes.data
    ranges = [line.split() for line in MAPS.read_text().splitlines()]
    (modes,) = [mode for span, mode, *_ in ranges if int(span.split("-")[0], 16) <= at < int(span.split("-")[1], 16)]
    assert modes == "r--s"


def test_views_cannot_be_written_and_torch_does_not_warn(tiny_model: Path) -> None:
    tensor = GgufFile(tiny_model).tensor("output_norm.weight")
    with pytest.raises(ValueError, match="read-only"):
        tensor.data[0] = 1
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = tensor.values()
    finally:
        torch.set_warn_always(False)
    assert values.data_ptr() == tensor.data.ctypes.data


def test_no_parameter_lies_in_the_mapping(generated: Callable[[Shape], GeneratedModel]) -> None:
    """A float32 tensor of the file needs no conversion, and still is a copy: parameters may be written to."""
    loaded = load_model(generated(Shape(dense_type=Type.F32)).path, progress=False, option_overrides=REFERENCE)
    views = [tensor.data for tensor in loaded.loader.file.tensors.values()]
    spans = [range(view.ctypes.data, view.ctypes.data + len(view)) for view in views]
    for name, parameter in loaded.model.named_parameters():
        assert not any(parameter.data_ptr() in span for span in spans), name
