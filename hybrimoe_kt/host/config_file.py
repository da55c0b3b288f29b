"""Reads a model directory's config.json as Transformers' configuration of its language model."""

from __future__ import annotations

import json
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
    stated = values.get("model_type") if isinstance(values, dict) else None
    same = next((family.model_type for family in every_architecture() if stated in family.other_types), None)
    if same is not None:
        return AutoConfig.for_model(same, **{key: value for key, value in values.items() if key != "model_type"})
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
