"""Reads GGUF files: metadata, the tensor table, and tensors as views of the mapped bytes.

Written for files that may be hostile or cut short: every length is checked against the file before it is
believed. gguf-py's own reader takes 14 s on a 152k vocabulary (it builds an array per string); this one walks
the header once. Format: the GGUF specification, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrimoe_kt.device.packed import PackedMatrix
from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.quants import TYPES, type_name

from .overrides import overridden

__all__ = ["GgufFile", "GgufTensor"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PIECE_NAME = re.compile(r"(?:-split-[a-z]{1,2}|\.part[-_]?\d+(?:-?of-?\d+)?|\.gguf\.\d+)$", re.IGNORECASE)
"""Of files that were cut by size, before GGUF had splits of its own."""
_BESIDE_A_MODEL = re.compile(r"mmproj|imatrix|lora|adapter", re.IGNORECASE)
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `data` is a read-only uint8 view of the mapping, `[num_bytes]`; `shape` is in torch order."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    data: np.ndarray

    @property
    def type_name(self) -> str:
        return type_name(self.ggml_type)

    def values(self) -> torch.Tensor:
        """The bytes as torch sees them, in place: uint8 `[num_bytes]`, never to be written to.

        torch has no read-only tensors and warns; writing into the mapping would be a segmentation fault.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            return torch.from_numpy(self.data)

    def packed(self) -> PackedMatrix:
        """A matrix in place; of three dimensions, one for each head."""
        *heads, rows, columns = self.shape
        return PackedMatrix(self.name, self.values(), self.ggml_type, rows, columns, *heads)


class GgufFile:
    """A GGUF model: one file, or all files of a split one, mapped and never read wholesale.

    The mapping is shared and read-only: a driver that page-locks pages in place copies each page of a private one
    first. It lives as long as this object or any view taken from it.
    """

    def __init__(self, path: str | Path, changes: Mapping[str, Any] | None = None) -> None:
        """`changes` are metadata in the place of the file's own; ConfigError where they are of another type."""
        try:
            self._open(Path(path), changes or {})
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None

    def _open(self, path: Path, changes: Mapping[str, Any]) -> None:
        self.files = _resolve(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._mappings: list[np.memmap] = []
        parsed = [_parse(file) for file in self.files]
        if len(self.files) == 1 and _split_count(path, parsed[0][0]) > 1:
            self.files = _siblings(self.files[0], _split_count(path, parsed[0][0]))
            parsed = [_parse(file) for file in self.files]
        for number, (metadata, tensors, mapping) in enumerate(parsed):
            self._mappings.append(mapping)
            if number == 0:
                self.metadata = metadata
                _check_split_count(self.files[0], metadata, len(self.files))
            self.tensors.update(tensors)
        self.added = changes.keys() - self.metadata.keys()
        """Keys that the file itself does not have."""
        self.metadata = overridden(self.metadata, changes, self.path)
        _check_tensor_count(self.files[0], self.metadata, len(self.tensors))

    def release_pages(self) -> None:
        """Drop what has been read of the mappings from this process's memory; it is read again when touched."""
        for blob in self._mappings:
            if hasattr(mmap, "MADV_DONTNEED"):
                blob._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    @property
    def path(self) -> Path:
        """The file named to the user: the first of a split model."""
        return self.files[0]

    @property
    def architecture(self) -> str:
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise ModelError(f"{self.path}: no general.architecture in the metadata, so this is not a model file")
        return name

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor by its GGUF name; a missing one is a ModelError naming it and the file."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelError(f"{self.path}: tensor {name!r} is missing from the file") from None


def _resolve(path: Path) -> list[Path]:
    """Return every file of the model that `path` (a file, any split of it, or a directory) names, in order."""
    if not path.exists():
        raise ModelError(f"{path}: no such file or directory; --gguf_path takes a .gguf file or a directory of them")
    if path.is_dir():
        path = _first_in_directory(path)
    if cut := _PIECE_NAME.search(path.name):
        whole = path.name[: cut.start()].removesuffix(".gguf") + ".gguf"
        raise ModelError(
            f"{path}: one piece of a file that was cut by size; join them all, in order: cat ... > {whole}"
        )
    match = _SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    if count == 0:
        raise ModelError(f"{path}: a split model of 0 files; restore the original name")
    names = [f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} of {count} splits missing, first {missing[0]!r}; all must lie in {path.parent}"
        )
    return [path.parent / name for name in names]


def _first_in_directory(directory: Path) -> Path:
    every = sorted(file for file in directory.iterdir() if file.name.lower().endswith(".gguf") and file.is_file())
    if not every:
        raise ModelError(f"{directory}: no .gguf file in this directory")
    files = [file for file in every if not _BESIDE_A_MODEL.match(file.name)] or every
    models = {(_SPLIT_NAME.match(file.name) or {"stem": file.name})["stem"] for file in files}
    if len(models) > 1 and not _are_splits_of_one(files):
        raise ModelError(f"{directory}: holds {len(models)} models ({', '.join(sorted(models)[:4])}); name one file")
    return files[0]


def _are_splits_of_one(files: list[Path]) -> bool:
    """Whether these are all splits of a model, whatever they are called."""
    try:
        first = _parse(files[0])[0]
        return set(_siblings(files[0], _split_count(files[0], first))) == set(files)
    except ModelError:
        return False


def _split_count(file: Path, metadata: Mapping[str, Any]) -> int:
    count = metadata.get("split.count", 0)
    if not isinstance(count, int):
        raise ModelError(f"{file}: damaged GGUF: split.count is {count!r}")
    return count


def _siblings(path: Path, count: int) -> list[Path]:
    """Return the splits of the model that `path` is one of, whatever a browser or a hub has called them.

    They are known by what stands in them: the number of the split, and how many there are of how many tensors.
    """
    found: dict[Any, list[Path]] = {}
    wanted = _parse(path)[0].get("split.tensors.count")
    for file in sorted(file for file in path.parent.iterdir() if file.name.lower().endswith(".gguf")):
        try:
            metadata = _parse(file)[0]
        except (ModelError, OSError):
            continue
        if metadata.get("split.count") == count and metadata.get("split.tensors.count") == wanted:
            found.setdefault(metadata.get("split.no"), []).append(file)
    if sorted(map(str, found)) != sorted(map(str, range(count))) or any(len(files) > 1 for files in found.values()):
        raise ModelError(
            f"{path}: one split of {count}, but its name does not end in -00001-of-{count:05d}.gguf, and the others "
            f"cannot be told from what lies beside it; restore the original names"
        )
    return [found[number][0] for number in range(count)]


def _check_split_count(file: Path, metadata: Mapping[str, Any], num_files: int) -> None:
    if _split_count(file, metadata) > 1 and _split_count(file, metadata) != num_files:
        raise ModelError(f"{file}: one split of {metadata['split.count']}, {num_files} were found; restore the names")


def _check_tensor_count(file: Path, metadata: dict[str, Any], num_tensors: int) -> None:
    expected = metadata.get("split.tensors.count", num_tensors)
    if expected != num_tensors:
        raise ModelError(f"{file}: the splits hold {num_tensors} tensors, the metadata promises {expected}")


class _Header:
    """A cursor over the mapped bytes; running past the end is a ModelError."""

    def __init__(self, blob: np.ndarray, file: Path) -> None:
        self.blob, self.file, self.position = memoryview(blob.data), file, 0

    def take(self, num_bytes: int) -> memoryview:
        end = self.position + num_bytes
        if num_bytes < 0 or end > len(self.blob):
            raise ModelError(
                f"{self.file}: truncated GGUF: the header runs past the end of the file; download it again"
            )
        piece = self.blob[self.position : end]
        self.position = end
        return piece

    def scalars(self, code: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        return layout.unpack(self.take(layout.size))

    def string(self) -> str:
        (length,) = self.scalars("Q")
        return bytes(self.take(length)).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ModelError(f"{self.file}: damaged GGUF: metadata value of unknown type {kind}")
        item_kind, count = *self.scalars("I"), *self.scalars("Q")
        if item_kind == _ARRAY:
            raise ModelError(f"{self.file}: damaged GGUF: an array of arrays")
        if item_kind in _SCALARS:
            if count > len(self.blob):
                self.take(count)  # raises: no array can be longer than its file
            return list(self.scalars(_SCALARS[item_kind], count))
        return [self.value(item_kind) for _ in range(count)]


def _parse(file: Path) -> tuple[dict[str, Any], dict[str, GgufTensor], np.memmap]:
    if file.stat().st_size < 24:
        raise ModelError(f"{file}: not a GGUF file ({file.stat().st_size} bytes)")
    blob = np.memmap(file, mode="r", dtype=np.uint8)
    header = _Header(blob, file)
    if bytes(header.take(4)) != b"GGUF":
        raise ModelError(f"{file}: not a GGUF file (it does not start with the letters GGUF)")
    (version,) = header.scalars("I")
    if version not in (2, 3):
        raise ModelError(f"{file}: GGUF version {version}; versions 2 and 3 are readable")
    num_tensors, num_values = header.scalars("Q", 2)
    metadata = {header.string(): header.value(*header.scalars("I")) for _ in range(num_values)}
    table = [_table_entry(header) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{file}: damaged GGUF: general.alignment is {alignment!r}, not a power of two")
    start = math.ceil(header.position / alignment) * alignment
    return metadata, {entry[0]: _view(file, blob, start, *entry) for entry in table}, blob


def _table_entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name = header.string()
    (num_dims,) = header.scalars("I")
    if num_dims > 4:
        raise ModelError(f"{header.file}: damaged GGUF: tensor {name!r} claims {num_dims} dimensions")
    shape = tuple(reversed(header.scalars("Q", num_dims)))
    ggml_type, offset = *header.scalars("I"), *header.scalars("Q")
    return name, shape, ggml_type, offset


def _view(
    file: Path, blob: np.ndarray, start: int, name: str, shape: tuple[int, ...], ggml_type: int, offset: int
) -> GgufTensor:
    kind = TYPES.get(ggml_type)
    if kind is None:
        raise ModelError(f"{file}: tensor {name!r} has unknown {type_name(ggml_type)}; a newer gguf is needed")
    block = kind.block_values
    if shape and shape[-1] % block:
        raise ModelError(f"{file}: damaged GGUF: rows of {name!r} are {shape[-1]} long, not a multiple of {block}")
    num_bytes = math.prod(shape) // block * kind.block_bytes
    begin = start + offset
    if begin + num_bytes > len(blob):
        raise ModelError(
            f"{file}: truncated GGUF: tensor {name!r} ends at byte {begin + num_bytes:,}, "
            f"the file has {len(blob):,}; download it again"
        )
    return GgufTensor(name, shape, ggml_type, blob[begin : begin + num_bytes])
