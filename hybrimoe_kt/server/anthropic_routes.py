"""Anthropic's endpoints: `/v1/messages`, and how many tokens a conversation has."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from .anthropic_input import PLACES, chat_of
from .anthropic_output import PING, MessagesReply, failed
from .anthropic_schema import MessagesRequest
from .anthropic_thinking import Thinking
from .errors import Json, named_as
from .openai_input import chat_input
from .service import Service
from .streams import EventStream, until_cut_short, whole_response
from .translation import begin

__all__ = ["anthropic_routes"]


def anthropic_routes(service: Service) -> APIRouter:
    """Return the endpoints that answer with `service`."""
    router = APIRouter(tags=["Anthropic"])
    thinking = Thinking(service)

    @router.post("/v1/messages")
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        service.check_model(body.model)
        with named_as(PLACES):
            events, sampling = await begin(service, chat_of(body, await thinking.options(body)))
        counts = {"num_prompt_tokens": events.num_prompt_tokens, "max_new_tokens": sampling.max_new_tokens}
        reply = MessagesReply(service, **counts)
        if body.stream:
            return EventStream(until_cut_short(reply.pieces(aiter(events)), failed, ping=PING), events)
        return await whole_response(request, events, reply.whole(aiter(events)))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: MessagesRequest) -> Json:
        service.check_model(body.model)
        with named_as(PLACES):
            given = chat_input(chat_of(body, await thinking.options(body)), service)
        return Json({"input_tokens": await service.num_chat_tokens(given)})

    return router
