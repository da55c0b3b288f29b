"""What several tests of the host use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a rule file; the next one takes its place."""

    def write(text: str) -> Path:
        file = tmp_path / "rules.yaml"
        file.write_text(text)
        return file

    return write
