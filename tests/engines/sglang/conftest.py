"""Tiny models, as vLLM's tests have them, and what SGLang imports that a machine without a card has not."""

from __future__ import annotations

import runpy
from importlib.util import find_spec

from tests.engines.vllm.conftest import family

from .offline import STAND_INS

__all__ = ["family"]

if find_spec("sglang") is not None:
    runpy.run_path(str(STAND_INS / "sitecustomize.py"))
