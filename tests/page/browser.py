"""Finds a browser on this machine, or says why there is none."""

from __future__ import annotations

import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
HOW = "pip install '.[browser]' and a Chromium (Debian: apt install chromium) let them run"


def find_browser() -> str | None:
    """Return the path of a Chromium: $HYBRIMOE_BROWSER, or one on the PATH."""
    named = os.environ.get("HYBRIMOE_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)
