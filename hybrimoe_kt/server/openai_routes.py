"""OpenAI's endpoints: `/v1/chat/completions`, `/v1/completions`, `/v1/models`."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .errors import ApiError, Json, error_body
from .openai_input import chat_input, completion_prompts, num_answers, sampling_of, stops_of
from .openai_output import Reply
from .openai_schema import ChatRequest, CompletionRequest
from .service import Events, Service
from .streams import EventStream, sse, until_cut_short, whole_response

__all__ = ["openai_routes"]


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
        pieces = reply.pieces(aiter(events), with_usage=with_usage)
        return EventStream(until_cut_short(pieces, _failed), events)
    return await whole_response(request, events, reply.whole(aiter(events)))


def _failed(error: ApiError) -> str:
    return sse(error_body("/v1", error))
