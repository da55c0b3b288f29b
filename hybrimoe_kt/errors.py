"""Every error a user can meet.

HybriMoEError
 +-- ConfigError (also ValueError)      an option, profile or trace that cannot be used
 |    +-- RuleError                     a rule file: knows file, line, rule number and key
 +-- ModelError                         GGUF or model files
 +-- CapacityError                      more memory, slots or context asked for than there is
 +-- CalibrationError                   a measurement that cannot be trusted
 +-- KernelError                        an expert backend that refused or failed
 |    +-- DeadlineError                 something that never ended
 +-- HostCompatibilityError             a host framework of the wrong version

A message says in one sentence what was given, what is valid, and what to do.
The CLI prints it and exits with code 2; a traceback means a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class HybriMoEError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(HybriMoEError, ValueError):
    """An option, profile or trace that cannot be used as given."""


class RuleError(ConfigError):
    """A rule file that cannot be used; `rule` counts from 1, `line` is the offending key's, or the rule's first."""

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        rule: int | None = None,
        key: str | None = None,
    ) -> None:
        self.file, self.line, self.rule, self.key = file, line, rule, key
        place = ":".join(str(part) for part in (file, line) if part is not None)
        number = f"rule {rule}: " if rule is not None else ""
        super().__init__(f"{place + ': ' if place else ''}{number}{message}")


class ModelError(HybriMoEError):
    """GGUF or model files that are missing, broken, unsupported or contradictory."""


class CapacityError(HybriMoEError):
    """More memory, slots or context asked for than there is."""


class CalibrationError(HybriMoEError):
    """A measurement that cannot be trusted."""


class KernelError(HybriMoEError):
    """An expert backend that refused its input or failed while computing."""


class DeadlineError(KernelError):
    """Work that did not end in the time anything may take; whatever does it is taken for dead."""


class HostCompatibilityError(HybriMoEError):
    """A host framework whose version this package does not support; the message names the version found."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the closest valid name, or an empty string when none is close."""
    match = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return the sentence for a name that is not one of `valid`."""
    names = sorted(valid)
    return f"unknown {kind} {name!r}{nearest(name, names) or ';'} valid: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def summary(error: BaseException) -> str:
    """An error in one line, its type before what it says: for those that no user was meant to meet."""
    return f"{type(error).__name__}: {first_line(error)}"
