"""Versions of Transformers that do not do are named, not met as a missing name somewhere inside."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from hybrimoe_kt.errors import HostCompatibilityError
from hybrimoe_kt.host.hf import versions


@pytest.mark.parametrize("found", ["4.57.6", "5.17.0", "6.0.0", "7.1"])
def test_an_unknown_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.raises(HostCompatibilityError, match=re.escape(f"transformers {found} is installed")):
        versions.check_transformers()


@pytest.mark.parametrize("found", ["5.18.0", "5.23.0", "5.99.1", "not a version"])
def test_others_are_left_to_try(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    versions.check_transformers()


@pytest.mark.parametrize(("found", "warns"), [("5.24.9", False), ("5.25.0", True)])
def test_a_newer_one_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: str, warns: bool
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    versions.check_transformers()
    assert (f"transformers {found} is newer than" in caplog.text) == warns


def test_a_missing_one_is_left_to_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    versions.check_transformers()


def test_the_package_asks_for_the_same_range() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={versions.OLDEST},<{versions.UNTRIED}"' in project
