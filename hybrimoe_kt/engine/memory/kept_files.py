"""Kept conversations as files, from which another process goes on: nothing is read again after a restart.

A conversation is a safetensors file of what every layer keeps, with its token ids in the metadata. Whoever can read the
folder can read what was said. Files are of one model, one package version and one way to keep keys and values; those of
others are left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrimoe_kt.errors import ConfigError, first_line
from hybrimoe_kt.version import __version__

from .growing_cache import GrowingCache
from .host_copy import HostCopy
from .layer_states import LayerStates

__all__ = ["KeptFiles", "identity"]

logger = logging.getLogger(__name__)

_FORMAT = 1
_NAME = "hybrimoe_kt"
"""Of the metadata's one entry."""
_UNWRITABLE = OSError, SafetensorError, RuntimeError
"""What folders raise that are full, and torch and safetensors of what they do not write."""
_UNREADABLE = *_UNWRITABLE, ValueError, KeyError, TypeError, AttributeError
"""What files raise that are not as they were written."""
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
"""Of each weight file, that tell it from another of the same size."""
_ENDING, _PART = ".safetensors", ".part"
_ABANDONED_S = 3600.0
"""After which a file that is being written is nobody's any more."""


def identity(
    files: Iterable[Path], metadata: Mapping[str, Any], config: Any, cache: GrowingCache, kept: Iterable[Any]
) -> str:
    """What stands for all that a conversation's states follow from but its tokens.

    `files` have the weights, `metadata` is theirs with what was put in its place, `config` is Transformers' of the
    model, `cache` an empty one, and `kept` how and where it keeps values.
    """
    layers = [type(layer).__name__ for layer in cache.layers]
    known = {key: str(value) for key, value in metadata.items() if not key.startswith("tokenizer.")}
    own = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    told = [_FORMAT, __version__, known, own, layers, list(map(str, kept))]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(_NUM_SAMPLES):
                file.seek(number * max(0, size - _SAMPLE_BYTES) // max(1, _NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:24]


class KeptFiles:
    """The files of one model in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        """`name` is an `identity`. ConfigError where the folder cannot be had."""
        self.folder = folder / name
        self._loaded: dict[Path, HostCopy] = {}
        self._refused: set[Path] = set()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder}: conversations cannot be kept there: {error.strerror or error}; give another folder"
            ) from None

    def save(
        self, copies: Iterable[HostCopy], most_bytes: int, on_saved: Callable[[int], object] = lambda num_bytes: None
    ) -> int:
        """Write what is not there, the one used last as the latest; return how many are.

        What was loaded and is not among them goes, but for what `keep_to` left out, and older files until all take
        `most_bytes` together. `on_saved` hears how large each is. ConfigError for what the folder refuses.
        """
        saved: dict[Path, None] = {}
        now = time.time_ns()
        for number, copy in enumerate(copies):
            path = self.folder / f"{_digest(copy)}{_ENDING}"
            try:
                if path in self._refused or not path.exists():
                    self._write(copy, path)
                    self._refused.discard(path)
                os.utime(path, ns=(now + number, now + number))
            except _UNWRITABLE as error:
                raise ConfigError(
                    f"{self.folder}: conversations cannot be kept there: {first_line(error)}; give another folder, or "
                    f"a smaller --cache_ram"
                ) from error
            saved[path] = None
            on_saved(copy.num_bytes)
        for path in self._loaded.keys() - saved.keys():
            path.unlink(missing_ok=True)
        self._loaded.clear()
        self._forget(most_bytes)
        return sum(path.exists() for path in saved)

    def _write(self, copy: HostCopy, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}

        def told(states: LayerStates | None, prefix: str) -> dict[str, Any] | None:
            if states is None:
                return None
            named = {f"{prefix}.{number}": tensor for number, tensor in enumerate(states.tensors)}
            tensors.update({name: tensor.cpu().contiguous() for name, tensor in named.items()})
            return {
                "length": states.length, "device": str(states.device), "names": states.names, "tensors": list(named),
            }  # fmt: skip

        about = {
            "format": _FORMAT,
            "ids": copy.ids,
            "num_before": copy.num_before,
            "is_croppable": copy.is_croppable,
            "states": [told(states, f"layer.{layer}") for layer, states in enumerate(copy.states)],
            "marks": {
                length: [told(states, f"mark.{length}.{layer}") for layer, states in enumerate(marked)]
                for length, marked in copy.marks.items()
            },
        }
        part = path.with_name(f"{path.name}.{os.getpid()}{_PART}")
        try:
            save_file(tensors, part, {_NAME: json.dumps(about)})
            part.chmod(0o600)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _forget(self, most_bytes: int) -> None:
        for part in self.folder.glob(f"*{_PART}"):
            with contextlib.suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED_S:
                    part.unlink()
        sizes = {}
        for path in self._paths():
            with contextlib.suppress(OSError):
                sizes[path] = path.stat().st_size
        while sizes and sum(sizes.values()) > most_bytes and len(sizes) > 1:
            oldest = next(iter(sizes))
            oldest.unlink(missing_ok=True)
            del sizes[oldest]

    def load(self) -> list[HostCopy]:
        """What is there, the one used last last; values are read from the files as they are wanted.

        Files that are not understood are named in a warning and left alone.
        """
        found = []
        for path in self._paths():
            try:
                self._loaded[path] = copy = _read(path)
                found.append(copy)
            except _UNREADABLE as error:
                self._refused.add(path)
                logger.warning(
                    "%s holds no conversation that can be gone on with (%s); it is left alone", path, first_line(error)
                )
        return found

    def keep_to(self, copies: Iterable[HostCopy]) -> None:
        """Take note that nobody goes on from what was loaded but is not among these: those files stay as they are."""
        kept = set(map(id, copies))
        self._loaded = {path: copy for path, copy in self._loaded.items() if id(copy) in kept}

    def _paths(self) -> list[Path]:
        times = {}
        for path in self.folder.glob(f"*{_ENDING}"):
            with contextlib.suppress(OSError):  # another process has forgotten it
                times[path] = path.stat().st_mtime_ns
        return sorted(times, key=lambda path: (times[path], path))


def _digest(copy: HostCopy) -> str:
    """Of all that tells one from another."""
    told = [copy.ids, copy.num_before, sorted(copy.marks)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


def _read(path: Path) -> HostCopy:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})[_NAME])
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']}, not {_FORMAT}")
        ids = about["ids"]
        if not ids or not all(type(token) is int for token in ids):
            raise ValueError("no token ids")

        def states(told: Mapping[str, Any]) -> LayerStates:
            tensors = tuple(file.get_tensor(name) for name in told["tensors"])
            names = tuple((str(kind), int(number)) for kind, number in told["names"])
            return LayerStates(int(told["length"]), tensors, torch.device(told["device"]), names)

        layers = [states(told) for told in about["states"]]
        if any(each.length != len(ids) for each in layers):
            raise ValueError("layers hold another number of tokens")
        marks = {
            int(length): [None if told is None else states(told) for told in marked]
            for length, marked in about["marks"].items()
        }
        return HostCopy(ids, int(about["num_before"]), layers, marks, bool(about["is_croppable"]))
