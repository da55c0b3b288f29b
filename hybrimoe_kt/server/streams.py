"""Answers on their way to a client, whole or piece by piece, in whatever shape; they end when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .errors import ApiError, Json, as_api_error
from .service import Events, unless_gone

__all__ = ["COMMENT", "EventStream", "sse", "until_cut_short", "whole_response"]

logger = logging.getLogger(__name__)

PING_S = 15.0
COMMENT = ": waiting\n\n"
"""What every client of server-sent events passes over."""


def sse(content: Any, name: str = "") -> str:
    """Return one server-sent event."""
    data = f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
    return f"event: {name}\n{data}" if name else data


class EventStream(StreamingResponse):
    """Server-sent events; the answer ends with the response, also when nobody ever began to read it."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], events: Events, media_type: str | None = None) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type=media_type)
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._events.cancel()


async def whole_response(request: Request, events: Events, whole: Awaitable[Any]) -> Response:
    """Return what `whole` makes of the events, once they are over."""
    async with events:
        content = await unless_gone(request.receive, whole)
    return Response(status_code=499) if content is None else Json(content)


async def until_cut_short(
    pieces: AsyncIterator[str], failed: Callable[[ApiError], str], *, ping: str = COMMENT
) -> AsyncIterator[str]:
    """Yield `pieces`, `ping` whenever none came for a while, and what `failed` says of an error.

    The status is sent already when one happens, so it is a part of the stream.
    """
    try:
        async for piece in _kept_alive(pieces, ping):
            yield piece
    except Exception as error:
        if not isinstance(error, ApiError):
            logger.warning("a stream was cut short: %s", error)
        yield failed(as_api_error(error))


async def _kept_alive(pieces: AsyncIterator[str], ping: str) -> AsyncIterator[str]:
    """Proxies close what is silent."""
    while True:
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait({coming}, timeout=PING_S))[0]:
                yield ping
            piece = await coming
        finally:
            coming.cancel()
        if piece is None:
            return
        yield piece
