"""Web pages, desktop apps and browser extensions that may use a server, by the origins they send."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

__all__ = ["EVERY_PAGE", "Origins", "parse_origin"]

EVERY_PAGE = ("*", "null", "file://", "http://*", "https://*")
"""Patterns that let in, by one way or another, any page that a browser on this machine shows."""

_WRITTEN = re.compile(r"([a-z][a-z0-9+.-]*)://(\*|\[[0-9a-f:.]+\]|[^/?#\s@:*\[\]]*)(?::(\d{1,5}|\*))?", re.IGNORECASE)
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def parse_origin(text: str) -> str | None:
    """Return an origin as browsers send it, or a pattern of them; None for what is neither.

    Patterns are `*` (any origin), `SCHEME://*` (any of a scheme) and `SCHEME://HOST:*` (any port). A scheme that pages
    on the web do not have may stand alone: `moz-extension://` is all extensions, `file://` all files.
    """
    text = text.strip()
    if text in ("*", "null"):
        return text
    match = _WRITTEN.fullmatch(text.rstrip("/") if not text.endswith("://") else text)
    if match is None:
        return None
    scheme, host, port = match[1].lower(), match[2].lower(), match[3]
    if scheme == "file":
        return "file://" if not host and port is None else None
    if not host:
        if scheme in _DEFAULT_PORTS or port is not None:
            return None
        host = "*"
    return f"{scheme}://{host}" + (f":{port}" if port not in (None, _DEFAULT_PORTS.get(scheme)) else "")


class Origins:
    """Those that are allowed; each as `parse_origin` returns it."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = tuple(allowed)
        self.pattern = "|".join(map(_pattern, self._allowed))
        """A regular expression of all of an allowed origin; empty when none is."""

    def allow(self, origin: str) -> bool:
        """Whether a request with this `Origin` may use the server."""
        return bool(self.pattern) and re.fullmatch(self.pattern, origin) is not None

    @property
    def host_names(self) -> list[str]:
        """Those of single web pages: what the server may be called behind a proxy that serves them."""
        named = [urlsplit(origin).hostname for origin in self._allowed if origin.startswith(("http://", "https://"))]
        return [name for name in named if name and name != "*"]


def _pattern(origin: str) -> str:
    if origin == "*":
        return ".*"
    if origin == "file://":  # which most browsers send as null
        return "file://|null"
    host_and_port = re.escape(origin).replace(r"://\*", r"://[^/]*")
    return re.sub(r":\\\*$", r"(?::\\d+)?", host_and_port)
