"""OpenAI's `/v1/responses`, for one conversation at a time that its client keeps."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from .errors import ApiError, Json, named_as
from .openai_input import chat_input
from .responses_input import PLACES, chat_of
from .responses_output import ResponsesReply
from .responses_schema import ResponsesRequest
from .service import Service
from .streams import EventStream, until_cut_short, whole_response
from .translation import begin

__all__ = ["responses_routes"]


def responses_routes(service: Service) -> APIRouter:
    """Return the endpoints that answer with `service`."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/responses")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        chat = chat_of(body)
        with named_as(PLACES):
            events, sampling = await begin(service, chat)
        reply = ResponsesReply(service, body, sampling)
        if body.stream:
            return EventStream(until_cut_short(reply.pieces(aiter(events)), reply.failed), events)
        return await whole_response(request, events, reply.whole(aiter(events)))

    @router.post("/v1/responses/input_tokens")
    async def count_input_tokens(body: ResponsesRequest) -> Json:
        service.check_model(body.model)
        chat = chat_of(body)
        with named_as(PLACES):
            num_tokens = await service.num_chat_tokens(chat_input(chat, service))
        return Json({"object": "response.input_tokens", "input_tokens": num_tokens})

    @router.api_route("/v1/responses/{path:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def kept_response(path: str) -> Response:
        raise ApiError(
            404, "this server keeps no responses; what it answered to POST /v1/responses was all", code="not_found"
        )

    return router
