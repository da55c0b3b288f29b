"""Servers that several tests ask: the embedded model's, and one that repeats what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

# Named on the command line, this file is read before the tests' own configuration, which kernels must not be
# imported before: the package is imported by what asks for a server.
if TYPE_CHECKING:
    from hybrimoe_kt.engine.engine import Engine

    from .serving import Serving


@pytest.fixture(scope="session")
def engine(embedded_model: Path) -> Engine:
    from hybrimoe_kt.engine.build import build_engine

    return build_engine(embedded_model, progress=False, option_overrides={"accelerator": "none"}, parallel=4)


@pytest.fixture(scope="module")
def embedded(engine: Engine) -> Iterator[Serving]:
    from .serving import serving

    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def echoing() -> Iterator[Serving]:
    from .scripted import ScriptedEngine
    from .serving import serving

    with serving(ScriptedEngine()) as running:
        yield running
