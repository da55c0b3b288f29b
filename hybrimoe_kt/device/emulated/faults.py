"""Faults on purpose: the n-th operation of a kind fails, at once or late, or never ends."""

from __future__ import annotations

from typing import Literal, NoReturn

import torch

__all__ = ["FaultInjected", "Faults"]

Failure = Literal["raise", "late", "stall", "out_of_memory"]


class FaultInjected(RuntimeError):
    """What an injected fault raises."""


class Faults:
    """Counts operations and lets the `at`-th of `kind` (copy, launch, allocate, cpu) fail in the given way."""

    def __init__(self, kind: str = "", at: int = -1, failure: Failure = "raise", times: int = 1) -> None:
        self.kind, self.at, self.failure, self.times = kind, at, failure, times
        self.seen = 0
        self.site: str | None = None
        """Where it struck, once it has."""

    def check(self, kind: str, site: str) -> Failure | None:
        """Count one operation; raise now, or return how it is to fail."""
        if kind != self.kind:
            return None
        self.seen += 1
        if not self.at < self.seen <= self.at + self.times:
            return None
        self.site = site
        if self.failure == "raise":
            raise FaultInjected(f"injected: {site}")
        if self.failure == "out_of_memory":
            raise torch.OutOfMemoryError(f"injected: {site}")
        return self.failure

    def raise_late(self) -> NoReturn:
        """What the failing work does when it runs."""
        raise FaultInjected(f"injected, late: {self.site}")
