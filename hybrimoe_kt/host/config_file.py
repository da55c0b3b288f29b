"""Reads a model directory's config.json as Transformers' configuration of its language model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hf.architectures import every_architecture

__all__ = ["read_config"]


def read_config(directory: Path) -> Any:
    """Return the configuration; whatever Transformers raises for one that it cannot use goes through.

    Of a model that also sees or hears, the text part; no code of the directory's own is run.
    """
    from transformers import AutoConfig

    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    same = _restated(values) if isinstance(values, dict) else None
    if same is not None:
        return same
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
    return _restated(config.to_dict()) or config


def _restated(values: Mapping[str, Any]) -> Any:
    """The configuration in the words of the model that runs it, None where these are its own."""
    from transformers import AutoConfig

    stated = values.get("model_type")
    family = next((family for family in every_architecture() if stated in family.other_types), None)
    if family is None:
        return None
    restated = {key: value for key, value in family.restated(values).items() if key != "model_type"}
    return AutoConfig.for_model(family.model_type, **restated)
