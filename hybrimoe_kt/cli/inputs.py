"""Text files a command reads."""

from __future__ import annotations

from pathlib import Path

from hybrimoe_kt.errors import ConfigError

__all__ = ["read_text"]


def read_text(file: Path, flag: str) -> str:
    """Return the file's text; ConfigError where it is not UTF-8 or cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{file}: {reason}; {flag} takes a text file") from None
