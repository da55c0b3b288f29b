"""Ends an answer where a stop string is complete, and never says a part of one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Watches one answer. Whatever the pieces, it ends at the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False
        self.which = ""
        """The one that was found."""

    def feed(self, text: str) -> str:
        """Return what can be said of `text` and of what was held back; `found` tells that the answer ends here."""
        if self.found:
            return ""
        self._held += text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            _, at, self.which = min(hits)
            said, self._held = self._held[:at], ""
            return said
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        said, self._held = self._held[:cut], self._held[cut:]
        return said

    def flush(self) -> str:
        """Return what was held back, at the end of the answer."""
        said, self._held = self._held, ""
        return said

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of what is held that `stop` begins with."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
