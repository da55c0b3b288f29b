"""Reads a model directory's config.json as Transformers' configuration of its language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_config"]

# Types that released files give to models which are one of Transformers' own under another name.
_SAME_MODEL = {"kimi_k2": "deepseek_v3"}


def read_config(directory: Path) -> Any:
    """Return the configuration; whatever Transformers raises for one that it cannot use goes through.

    Of a model that also sees or hears, the text part; no code of the directory's own is run.
    """
    from transformers import AutoConfig

    values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    same = _SAME_MODEL.get(values.get("model_type", "")) if isinstance(values, dict) else None
    if same is not None:
        return AutoConfig.for_model(same, **{key: value for key, value in values.items() if key != "model_type"})
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False).get_text_config()
