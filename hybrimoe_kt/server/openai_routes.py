"""OpenAI's endpoints: `/v1/chat/completions`, `/v1/completions`, `/v1/models`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from .errors import ApiError, Json, as_api_error, error_body
from .openai_input import chat_input, completion_prompts, num_answers, sampling_of, stops_of
from .openai_output import Reply
from .openai_schema import ChatRequest, CompletionRequest
from .service import Events, Service, unless_gone

__all__ = ["openai_routes"]

logger = logging.getLogger(__name__)

PING_S = 15.0


def openai_routes(service: Service) -> APIRouter:
    """Return the endpoints that answer with `service`."""
    router = APIRouter(tags=["OpenAI"])
    started = int(time.time())

    def shown_model() -> dict[str, Any]:
        limit = {"max_model_len": service.engine.context_tokens}
        return {"id": service.model_name, "object": "model", "created": started, "owned_by": "hybrimoe_kt", **limit}

    @router.get("/v1/models")
    async def list_models() -> Json:
        return Json({"object": "list", "data": [shown_model()]})

    @router.get("/v1/models/{model:path}")
    async def show_model(model: str) -> Json:
        service.check_model(model)
        return Json(shown_model())

    @router.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        sampling = sampling_of(service, body)
        count = num_answers(body)
        events = await service.chat(chat_input(body, service), sampling, stops_of(body), count)
        reply = Reply(service, is_chat=True, logprobs=bool(body.logprobs), num_answers=count)
        return await _respond(request, body, events, reply)

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        sampling = sampling_of(service, body)
        prompts = completion_prompts(body)
        count = num_answers(body)
        events = await service.complete(prompts, sampling, stops_of(body), count)
        echoed = [await service.text_of(prompt) for prompt in prompts] if body.echo else []
        has_logprobs = body.logprobs is not None
        reply = Reply(service, is_chat=False, logprobs=has_logprobs, echoed=echoed, num_answers=count)
        return await _respond(request, body, events, reply)

    return router


async def _respond(request: Request, body: ChatRequest | CompletionRequest, events: Events, reply: Reply) -> Response:
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return EventStream(_stream(events, reply, with_usage), events)
    async with events:
        whole = await unless_gone(request.receive, reply.whole(aiter(events)))
    return Response(status_code=499) if whole is None else Json(whole)


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


async def _stream(events: Events, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    try:
        async for piece in _kept_alive(reply.pieces(aiter(events), with_usage=with_usage)):
            yield piece
    except Exception as error:  # the status is sent already: say it in the stream
        shown = as_api_error(error)
        if not isinstance(error, ApiError):
            logger.warning("a stream was cut short: %s", error)
        yield f"data: {bytes(Json(error_body('/v1', shown)).body).decode()}\n\n"


async def _kept_alive(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield `pieces`, and a comment whenever none came for a while: proxies close what is silent."""
    while True:
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait({coming}, timeout=PING_S))[0]:
                yield ": waiting\n\n"
            piece = await coming
        finally:
            coming.cancel()
        if piece is None:
            return
        yield piece
