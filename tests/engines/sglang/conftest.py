"""Tiny models, as vLLM's tests have them, and what SGLang imports that a machine without a card has not."""

from __future__ import annotations

import runpy

import pytest

from tests.engines.vllm.conftest import family

from .offline import STAND_INS

__all__ = ["family"]

runpy.run_path(str(STAND_INS / "sitecustomize.py"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Importing SGLang alone takes half a minute in each of an engine's processes."""
    for item in items:
        item.add_marker(pytest.mark.timeout(900))
