"""What every request passes first: who may ask, from where, and whether anything is answered at all."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .clients import client_of_request
from .errors import ApiError, error_response
from .origins import Origins
from .queue import shutting_down
from .service import Service

__all__ = ["Access"]

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Access:
    """Refuses before any route is asked, and counts every response. HEAD is asked like GET, the body left out.

    - A key, when the server has one, on all paths but `open_paths`.
    - A request that a web page of another origin makes, unless the origin is allowed: a browser lets any page send
      one, and a server on this machine would work for whoever is visited.
    - On a loopback address also a foreign host name, under which a page could pass for this server's own; a reverse
      proxy's name is that of an allowed origin.
    """

    def __init__(
        self, app: ASGIApp, service: Service, open_paths: Collection[str], known_paths: Collection[str]
    ) -> None:
        self._app, self._service = app, service
        self._open_paths, self._known_paths = open_paths, known_paths
        self._key = (service.settings.api_key or "").encode()
        self._origins = Origins(service.settings.origins)
        self._names = (*_LOOPBACK_NAMES, *self._origins.host_names, "") if _is_loopback(service.settings.host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
                return
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = path if path in self._known_paths else "other"
                self._service.tally.count_request(known, message["status"])
            await send(message)

        if (refusal := self._refusal(scope)) is not None:
            refusal.headers |= self._readable_by(scope)
            await error_response(path, refusal)(scope, receive, counted)
            return
        client_of_request.set(str((scope.get("client") or ("",))[0]))
        if scope["method"] == "HEAD":  # the server below knows, and sends no body
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, counted)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._names is not None and _host_name(headers.get(b"host", b"")) not in self._names:
            return ApiError(
                403, "this server is for its own machine; behind a proxy, --cors_origin names its address there",
                code="foreign_host",
            )  # fmt: skip
        if self._is_foreign(headers) and scope["method"] != "OPTIONS":
            origin = headers[b"origin"][:200].decode("latin-1")
            return ApiError(
                403, f"a web page or app of another origin ({origin}) may not use this server; --cors_origin allows it",
                code="foreign_origin",
            )  # fmt: skip
        is_open = scope["path"] in self._open_paths or scope["method"] == "OPTIONS"
        if self._key and not is_open and not any(hmac.compare_digest(key, self._key) for key in _keys(headers)):
            return ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY, or as x-api-key: KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if self._service.is_shutting_down and (scope["method"] == "POST" or scope["path"] == "/health"):
            return shutting_down()
        return None

    def _readable_by(self, scope: Scope) -> dict[str, str]:
        """Headers with which a browser shows a refusal to the page that asked, when that may ask at all."""
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        allowed = origin if self._origins.allow(origin) else None
        return {"Access-Control-Allow-Origin": allowed, "Vary": "Origin"} if allowed else {}

    def _is_foreign(self, headers: dict[bytes, bytes]) -> bool:
        origin = headers.get(b"origin")
        if origin is None:
            return False
        own = headers.get(b"host", b"").decode("latin-1")
        shown = origin.decode("latin-1")
        is_own = shown.lower() in (f"http://{own.lower()}", f"https://{own.lower()}")
        return not is_own and not self._origins.allow(shown)


def _keys(headers: dict[bytes, bytes]) -> list[bytes]:
    """What is given as one, as OpenAI's and Ollama's clients send it, and as Anthropic's do."""
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return [given.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"").strip()]


def _host_name(host: bytes) -> str:
    try:
        return urlsplit("//" + host.decode("latin-1")).hostname or ""
    except ValueError:
        return "?"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
