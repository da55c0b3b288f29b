"""What browsers and hubs do to the names of files: still found, or told what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from gguf import GGUFValueType

from hybrimoe_kt.cli.main import main
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import GeneratedModel, Shape
from tests.support.rewritten import Tensors, rewritten

Generated = Callable[[Shape], GeneratedModel]


@pytest.fixture
def splits(generated: Generated, tmp_path: Path) -> list[Path]:
    """A model in three files, the metadata in the first alone."""
    whole = generated(Shape()).path
    names = [tensor.name for tensor in gguf.GGUFReader(str(whole)).tensors]
    made = []
    for number in range(3):

        def third(tensors: Tensors, number: int = number) -> Tensors:
            return {name: tensors[name] for name in names[number::3]}

        keys = {
            "split.no": (number, GGUFValueType.UINT16), "split.count": (3, GGUFValueType.UINT16),
            "split.tensors.count": (len(names), GGUFValueType.INT32),
        }  # fmt: skip
        made.append(rewritten(whole, tmp_path / f"m-{number + 1:05d}-of-00003.gguf", keys, third))
    return made


def names_of(path: Path) -> set[str]:
    return set(GgufFile(path).tensors)


def test_splits_are_found_whatever_they_are_called(splits: list[Path], generated: Generated) -> None:
    wanted = names_of(generated(Shape()).path)
    assert names_of(splits[1]) == wanted
    renamed = [
        splits[0].rename(splits[0].with_name("m-00001-of-00003 (1).gguf")),
        splits[1].rename(splits[1].with_name("Q8_0%2Fm-00002-of-00003.GGUF")),
        splits[2].rename(splits[2].with_name("sha256-0a1b.gguf")),
    ]
    for path in renamed:
        file = GgufFile(path)
        assert set(file.tensors) == wanted
        assert file.files == renamed and file.metadata["split.no"] == 0


def test_two_copies_or_a_missing_one_are_refused(splits: list[Path]) -> None:
    odd = splits[0].rename(splits[0].with_name("first.gguf"))
    copy = shutil.copy(splits[1], splits[1].with_name("again.gguf"))
    with pytest.raises(ModelError, match=r"one split of 3, .* cannot be told from what lies beside it"):
        GgufFile(odd)
    Path(copy).unlink()
    splits[2].unlink()
    with pytest.raises(ModelError, match="cannot be told from what lies beside it"):
        GgufFile(odd)


def test_a_directory_of_renamed_splits_is_one_model(splits: list[Path], tiny_model: Path) -> None:
    for file in splits:
        file.rename(file.with_name(f"{file.stem} (1).GGUF"))
    assert len(GgufFile(splits[0].parent).files) == 3
    shutil.copy(tiny_model, splits[0].with_name("another.gguf"))
    with pytest.raises(ModelError, match="holds 4 models"):
        GgufFile(splits[0].parent)


def test_a_name_that_no_file_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gguf_path", str(tmp_path / ("x" * 300)), "--prompt", "hi"]) == 2
    assert "cannot be read: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["m.gguf-split-a", "m.gguf.part1of2", "m.gguf.part-01-of-02", "m.gguf.001"])
def test_a_piece_cut_by_size_says_how_to_join(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"cut by size; join them all, in order: cat \.\.\. > m\.gguf$"):
        GgufFile(tmp_path / name)


def test_a_directory_with_a_projector_has_one_model(generated: Generated, tmp_path: Path) -> None:
    shutil.copy(generated(Shape()).path, tmp_path / "Model.Q8_0.GGUF")
    for name in ("mmproj-F16.gguf", "imatrix.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert GgufFile(tmp_path).path.name == "Model.Q8_0.GGUF"
