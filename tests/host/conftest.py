"""What several tests of the host use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a rule file; the next one takes its place."""

    def write(text: str) -> Path:
        file = tmp_path / "rules.yaml"
        file.write_text(text)
        return file

    return write


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KV cache with so little that a few tokens fill it."""
    from hybrimoe_kt.engine.memory import room

    monkeypatch.setattr(room, "_LEAST_ROOM", 4)
    monkeypatch.setattr(room, "_LEAST_FIXED_ROOM", 20)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
