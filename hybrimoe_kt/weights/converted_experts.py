"""Experts that were converted once, kept between runs: a safetensors file for each layer, mapped when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrimoe_kt.cache_folder import cache_folder

from .checkpoint import Checkpoint

__all__ = ["ConvertedExperts"]

logger = logging.getLogger(__name__)

_VERSION = 1
"""Of what is kept: another one is converted anew."""


class ConvertedExperts:
    """Of one checkpoint; what was converted from other files, or from these before they changed, is not used."""

    def __init__(self, file: Checkpoint) -> None:
        self._file = file
        self._bar: Any = None
        self._has_room = True

    @property
    def folder(self) -> Path:
        """Where they are kept, which depends on the files' names, sizes and times."""
        stated = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._file.files]
        told = repr((_VERSION, str(self._file.path.resolve()), stated))
        return cache_folder() / f"experts-{hashlib.sha256(told.encode()).hexdigest()[:16]}"

    def layer(
        self, layer: int, made_of: object, convert: Callable[[], Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """Return a layer's matrices by role, uint8: those that are kept, or what `convert` makes, kept if it can be.

        `made_of` is all beside the files that decides what they are; its representation counts.
        """
        told = hashlib.sha256(repr((self._file.scale_block, made_of)).encode()).hexdigest()[:8]
        path = self.folder / f"layer-{layer}-{told}.safetensors"
        found = _read(path)
        if found is not None:
            return found
        made = convert()
        self._keep(path, made)
        self._tell()
        return _read(path) or made

    def _keep(self, path: Path, made: Mapping[str, torch.Tensor]) -> None:
        needed = sum(data.numel() for data in made.values())
        beginning = path.with_suffix(f".{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent)
            if shutil.disk_usage(path.parent).free < 1.1 * needed:
                raise OSError(f"no room for {needed:,} bytes")
            save_file(dict(made), beginning)
            beginning.replace(path)
        except (OSError, SafetensorError) as error:
            if self._has_room:
                logger.warning(
                    "converted experts cannot be kept in %s (%s): they stay in memory and are converted anew in every "
                    "run",
                    path.parent,
                    error,
                )
            self._has_room = False
        finally:  # whatever came in between
            with contextlib.suppress(OSError):
                beginning.unlink(missing_ok=True)

    def _tell(self) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            logger.info("FP8 experts become Q8_0 once, in %s", self.folder)
            total = self._file.num_expert_layers
            self._bar = tqdm(
                total=total, desc="converting experts to Q8_0", unit="layer", disable=not sys.stderr.isatty()
            )
        self._bar.update()
        if self._bar.n >= (self._bar.total or 0):
            self._bar.close()


def _sweep(folder: Path) -> None:
    """Remove what processes that are gone had begun to write, where a system tells which are."""
    if not Path("/proc/self").exists():
        return
    for part in folder.glob("*.part"):
        number = part.suffixes[-2].lstrip(".") if len(part.suffixes) > 1 else ""
        if number.isdigit() and int(number) != os.getpid() and not Path(f"/proc/{number}").exists():
            part.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """What is kept there, mapped; None where nothing usable is."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        logger.warning("%s cannot be read (%s) and is converted anew", path, error)
        return None
