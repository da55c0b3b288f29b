"""Servers that several tests ask: the embedded model's, and one that repeats what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Engine

from .scripted import ScriptedEngine
from .serving import Serving, serving


@pytest.fixture(scope="session")
def engine(embedded_model: Path) -> Engine:
    return build_engine(embedded_model, progress=False, option_overrides={"accelerator": "none"}, parallel=4)


@pytest.fixture(scope="module")
def embedded(engine: Engine) -> Iterator[Serving]:
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def echoing() -> Iterator[Serving]:
    with serving(ScriptedEngine()) as running:
        yield running
