"""Things named by where they are: "package.module:name" or "package.module.name"."""

from __future__ import annotations

import importlib
import re
from typing import Any

__all__ = ["is_dotted", "load_dotted"]

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*")


def is_dotted(text: str) -> bool:
    """Whether `text` is written so; nothing is imported."""
    return _DOTTED.fullmatch(text) is not None


def load_dotted(path: str) -> Any:
    """Import what `path` names; ImportError or AttributeError where it is not there."""
    module, _, name = path.replace(":", ".").rpartition(".")
    return getattr(importlib.import_module(module), name)
