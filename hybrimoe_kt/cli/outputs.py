"""Files a command will write: found unwritable before the work, not after it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hybrimoe_kt.errors import ConfigError

__all__ = ["check_writable"]


def check_writable(file: Path | None, flag: str) -> None:
    """Raise ConfigError naming `flag` if `file` cannot be written; leaves no trace of having tried."""
    if file is None:
        return
    try:
        is_new = not file.exists()
        with file.open("ab"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{flag} {file}: cannot be written there ({reason})") from None
    if is_new:
        with contextlib.suppress(OSError):
            file.unlink()
