"""Models without weights, to see what a rule file does before any weights are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybrimoe_kt.errors import ModelError, unknown_name
from hybrimoe_kt.host.config_file import read_config
from hybrimoe_kt.host.hf.architectures import Architecture, every_architecture
from hybrimoe_kt.host.hf.language_models import language_model

__all__ = ["build_skeleton", "skeleton_from_directory", "skeleton_names"]


def skeleton_names() -> list[str]:
    """The architectures that have a skeleton, by their names here."""
    return list(_known())


def build_skeleton(name: str) -> nn.Module:
    """Return the model of a known architecture on the meta device."""
    from transformers import AutoConfig

    known = _known()
    if name not in known:
        raise ModelError(f"{unknown_name('architecture', name, known)}; or give a directory with a config.json")
    return _on_meta(AutoConfig.for_model(known[name].model_type, **known[name].skeleton))


def _known() -> dict[str, Architecture]:
    return {family.name: family for family in every_architecture() if family.skeleton}


def skeleton_from_directory(directory: str | Path) -> nn.Module:
    """Return the model that a directory's config.json describes, on the meta device; no weights are read."""
    if not (Path(directory) / "config.json").is_file():
        raise ModelError(f"{directory}: no config.json there; give a model directory or one of {', '.join(_known())}")
    try:
        return _on_meta(read_config(Path(directory)))
    except Exception as error:  # Transformers raises many kinds for a configuration it cannot use
        raise ModelError(f"{directory}: config.json describes no model known here: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = language_model(config)
    return model
