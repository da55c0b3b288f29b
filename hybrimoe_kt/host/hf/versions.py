"""Which versions of Transformers this host was seen to work with."""

from __future__ import annotations

import importlib.metadata
import logging

from packaging.version import InvalidVersion, Version

from hybrimoe_kt.errors import HostCompatibilityError

__all__ = ["check_transformers"]

logger = logging.getLogger(__name__)

OLDEST, UNTRIED, BELOW = "5.18", "5.25", "6"
"""The oldest that does; the first that was not tried; the first that is sure not to. pyproject.toml says what was."""


def check_transformers() -> None:
    """Raise HostCompatibilityError for a version known not to do: else the reason would be some missing name inside.

    Warns of one that is newer than what was tried. Reads what is installed without importing it; where nothing is,
    importing it will say so.
    """
    try:
        found = importlib.metadata.version("transformers")
        version = Version(found)
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return
    advice = f"pip install 'transformers>={OLDEST},<{UNTRIED}'"
    if not Version(OLDEST) <= version < Version(BELOW):
        raise HostCompatibilityError(
            f"transformers {found} is installed; loading models leans on internals of {OLDEST} and later: {advice}"
        )
    if version >= Version(UNTRIED):
        logger.warning("transformers %s is newer than what hybrimoe_kt was tried with; if it fails: %s", found, advice)
