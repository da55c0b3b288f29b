"""Request bodies: read whole, within a size and a time, and taken for JSON whatever they are called."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response

__all__ = ["BodyLimit"]


class BodyLimit:
    """Hands a request on once all of it is there; 413 and 408 for one that is too long or too slow.

    `curl -d`, which Ollama's examples use, calls every body a form: the content type is not believed.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_s: float) -> None:
        self._app, self._max_bytes, self._max_s = app, max_bytes, max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self._max_s)
        except ApiError as refusal:
            await error_response(scope["path"], refusal)(scope, receive, send)
            return
        except (TimeoutError, asyncio.TimeoutError):
            too_slow = ApiError(408, f"the request was not complete after {self._max_s:g} s", headers=_CLOSE)
            await error_response(scope["path"], too_slow)(scope, receive, send)
            return
        if body is None:
            return
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        await self._app({**scope, "headers": headers}, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, None when the client left.

        What is too long is read to its end and dropped, unless it is far too long: a client that is cut off while it
        sends never sees why.
        """
        too_long = ApiError(
            413, f"the request is longer than {self._max_bytes} bytes", code="request_too_large", headers=_CLOSE
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_bytes + _DROPPED_BYTES:
            raise too_long
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._max_bytes:
                pieces.clear()
            if size > self._max_bytes + _DROPPED_BYTES:
                raise too_long
            if not message.get("more_body", False):
                break
        if size > self._max_bytes:
            raise too_long
        return b"".join(pieces)


_DROPPED_BYTES = 64 * 2**20
_CLOSE = {"Connection": "close"}  # what is left of the body is not read
