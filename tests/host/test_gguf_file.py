"""Damaged files: whatever a byte says, the answer is a model or a ModelError, and soon."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.hf.architectures import architecture_of
from hybrimoe_kt.host.hf.gguf_file import GgufFile
from hybrimoe_kt.host.hf.sources import _config


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
