"""Which versions of Transformers this host was seen to work with."""

from __future__ import annotations

import importlib.metadata

from packaging.version import InvalidVersion, Version

from hybrimoe_kt.errors import HostCompatibilityError

__all__ = ["check_transformers"]

OLDEST, BELOW = "5.17", "6"
"""As in pyproject.toml, which says what was tried."""


def check_transformers() -> None:
    """Raise HostCompatibilityError for a version known not to do: else the reason would be some missing name inside.

    Reads what is installed without importing it. Where nothing is, importing it will say so.
    """
    try:
        found = importlib.metadata.version("transformers")
        is_known = Version(OLDEST) <= Version(found) < Version(BELOW)
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return
    if not is_known:
        raise HostCompatibilityError(
            f"transformers {found} is installed; loading models leans on internals of {OLDEST} to below {BELOW}: "
            f"pip install 'transformers>={OLDEST},<{BELOW}'"
        )
