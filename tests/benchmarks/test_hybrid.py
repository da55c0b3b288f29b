"""The benchmark of hybrid plans on the clock runs: what it measures is another matter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import hybrid

pytestmark = pytest.mark.slow


def test_every_method_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few tokens, on the emulated GPU and this machine's CPU, calibrated first."""
    file = tmp_path / "found.json"
    monkeypatch.setattr(
        sys, "argv", ["hybrid", "--tokens", "2", "--warm-up", "1", "--cache", "25%", "--json", str(file)]
    )
    hybrid.main()
    found = json.loads(file.read_text())
    assert [row["method"] for row in found["25%"]] == list(hybrid.METHODS)
    assert all(row["token_ms"] > 0 and row["predicted_ms"] > 0 for row in found["25%"])
