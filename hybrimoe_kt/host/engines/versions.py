"""Which versions of an engine an adapter was tried with, said once when it is loaded."""

from __future__ import annotations

import importlib.metadata
import logging

from packaging.version import InvalidVersion, Version

from hybrimoe_kt.errors import HostCompatibilityError

__all__ = ["check_engine"]

logger = logging.getLogger(__name__)


def check_engine(distributions: tuple[str, ...], oldest: str, below: str) -> str:
    """Return the version found of the first of `distributions` that is installed.

    HostCompatibilityError for one before `oldest`, whose extension points are others; a warning from `below` on, which
    nobody has tried. A build without a version ("dev") is taken.
    """
    for name in distributions:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        try:
            version = Version(found)
        except InvalidVersion:
            return found
        advice = f"pip install '{distributions[0]}>={oldest},<{below}'"
        if version < Version(oldest):
            raise HostCompatibilityError(f"{name} {found} is older than what hybrimoe_kt works with: {advice}")
        if version >= Version(below):
            logger.warning("%s %s is newer than what hybrimoe_kt was tried with; if it fails: %s", name, found, advice)
        return found
    return "unknown"
