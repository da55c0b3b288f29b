"""Families that vLLM has a model for, what it needs of their sizes, and what published config.json files say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ADAPTED: dict[str, Callable[[Any], Any]] = {}
PUBLISHED: dict[str, dict[str, Any]] = {}
