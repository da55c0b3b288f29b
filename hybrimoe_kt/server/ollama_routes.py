"""Ollama's endpoints, as far as its clients need them: chat, generate, and what is served."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybrimoe_kt.engine.events import Answer, Event, Finished, ToolCall
from hybrimoe_kt.engine.sampling import Sampling

from .errors import ApiError, Json, as_api_error
from .ollama_schema import ChatRequest, GenerateRequest, Message, Options, ShowRequest
from .openai_routes import EventStream
from .service import ChatInput, Events, Service, unless_gone

__all__ = ["ollama_routes"]

logger = logging.getLogger(__name__)

# The version whose interface this follows; clients compare it before they use newer parts.
_OLLAMA_VERSION = "0.12.0"


def ollama_routes(service: Service) -> APIRouter:
    """Return the endpoints that answer with `service`."""
    router = APIRouter(tags=["Ollama"])
    started = _now()

    def shown_model() -> dict[str, Any]:
        name = service.model_name
        return {"name": name, "model": name, "modified_at": started, **_description(service)}

    @router.get("/api/version")
    async def version() -> Json:
        return Json({"version": _OLLAMA_VERSION})

    @router.get("/api/tags")
    async def tags() -> Json:
        return Json({"models": [shown_model()]})

    @router.get("/api/ps")
    async def loaded() -> Json:
        return Json({"models": [shown_model() | {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}]})

    @router.post("/api/show")
    async def show(body: ShowRequest) -> Json:
        _check_model(service, body.model or body.name or "")
        return Json(_shown_details(service, started))

    @router.post("/api/chat")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _check(service, body)
        if not body.messages:  # how Ollama's clients ask for a model to be loaded
            return Json(_loaded(service, {"message": {"role": "assistant", "content": ""}}))
        given = ChatInput(
            messages=[_message(message) for message in body.messages],
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or []],
            template_options=_thinking(service, body.think),
        )
        return await _respond(service, request, body, lambda *how: service.chat(given, *how), _in_message)

    @router.post("/api/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        _check(service, body)
        for name in ("suffix", "template", "context", "images"):
            if getattr(body, name):
                raise ApiError(400, f"{name} is not supported")
        if not body.prompt:
            return Json(_loaded(service, {"response": ""}))
        if body.raw:
            return await _respond(
                service, request, body, lambda *how: service.complete(body.prompt, *how), _in_response
            )
        system = [{"role": "system", "content": body.system}] if body.system else []
        given = ChatInput(
            messages=[*system, {"role": "user", "content": body.prompt}],
            template_options=_thinking(service, body.think),
        )
        return await _respond(service, request, body, lambda *how: service.chat(given, *how), _in_response)

    return router


def _check(service: Service, body: ChatRequest | GenerateRequest) -> None:
    _check_model(service, body.model)
    if body.format:
        raise ApiError(400, "format is not supported: answers cannot be held to a format here")


def _check_model(service: Service, name: str) -> None:
    try:
        service.check_model(name)
    except ApiError:
        raise ApiError(404, f"model {name!r} not found") from None


def _thinking(service: Service, think: bool | str | None) -> dict[str, Any]:
    if think is None:
        return {}
    if not service.engine.vocabulary.takes("enable_thinking"):
        if think is False:
            return {}
        raise ApiError(400, f"{service.model_name!r} does not support thinking")
    return {"enable_thinking": bool(think)}


def _message(message: Message) -> dict[str, Any]:
    if message.images:
        raise ApiError(400, "images are not supported")
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.thinking is not None:
        shown["reasoning_content"] = message.thinking
    if message.tool_name is not None:
        shown["name"] = message.tool_name
    if message.tool_calls:
        shown["tool_calls"] = [
            {"type": "function", "function": call.function.model_dump()} for call in message.tool_calls
        ]
    return shown


def _how(service: Service, options: Options) -> tuple[Sampling, tuple[str, ...]]:
    settings = service.settings
    wanted = options.num_predict if options.num_predict is not None and options.num_predict > 0 else None
    sampling = Sampling(
        max_new_tokens=service.longest_answer(wanted),
        temperature=settings.temperature if options.temperature is None else options.temperature,
        top_p=settings.top_p if options.top_p is None else options.top_p,
        top_k=max(0, options.top_k or 0),
        min_p=options.min_p or 0.0,
        repetition_penalty=1.0 if options.repeat_penalty is None else options.repeat_penalty,
        frequency_penalty=options.frequency_penalty or 0.0,
        presence_penalty=options.presence_penalty or 0.0,
        seed=settings.seed if options.seed is None else options.seed,
    )
    stop = options.stop
    return sampling, (stop,) if isinstance(stop, str) else tuple(stop or ())


async def _respond(
    service: Service,
    request: Request,
    body: ChatRequest | GenerateRequest,
    begin: Callable[..., Any],
    shape: Callable[..., dict[str, Any]],
) -> Response:
    began = time.perf_counter()
    events: Events = await begin(*_how(service, body.options or Options()))
    if body.stream:
        lines = _lines(service, aiter(events), shape, began)
        return EventStream(lines, events, media_type="application/x-ndjson")
    async with events:
        whole = await unless_gone(request.receive, _whole(service, aiter(events), shape, began))
    return Response(status_code=499) if whole is None else Json(whole)


async def _lines(
    service: Service, events: AsyncIterator[Event], shape: Callable[..., dict[str, Any]], began: float
) -> AsyncIterator[str]:
    try:
        async for event in events:
            head = {"model": service.model_name, "created_at": _now()}
            if isinstance(event, Finished):
                yield _line(head | shape() | _ending(event.reason, event.run, began))
            elif isinstance(event, ToolCall):
                yield _line(head | shape(calls=[_shown_call(event)]) | {"done": False})
            elif event.text:
                said = {"thoughts" if event.is_thought else "text": event.text}
                yield _line(head | shape(**said) | {"done": False})
    except Exception as error:  # the status is sent already: say it in the stream
        if not isinstance(error, ApiError):
            logger.warning("a stream was cut short: %s", error)
        yield _line({"error": as_api_error(error).message})


async def _whole(
    service: Service, events: AsyncIterator[Event], shape: Callable[..., dict[str, Any]], began: float
) -> dict[str, Any]:
    answer = Answer.of([event async for event in events])
    calls = [_shown_call(call) for call in answer.tool_calls]
    head = {"model": service.model_name, "created_at": _now()}
    said = shape(text=answer.text, thoughts=answer.thoughts, calls=calls)
    return head | said | _ending(answer.reason, answer.run, began)


def _in_message(*, text: str = "", thoughts: str = "", calls: list[Any] | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thoughts:
        message["thinking"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def _in_response(*, text: str = "", thoughts: str = "", calls: list[Any] | None = None) -> dict[str, Any]:
    return {"response": text, **({"thinking": thoughts} if thoughts else {})}


def _shown_call(call: ToolCall) -> dict[str, Any]:
    return {"function": {"name": call.name, "arguments": dict(call.arguments)}}


def _ending(reason: str, run: Mapping[str, Any], began: float) -> dict[str, Any]:
    """Durations are nanoseconds."""
    return {
        "done": True,
        "done_reason": "length" if reason == "length" else "stop",
        "total_duration": _ns(time.perf_counter() - began),
        "load_duration": 0,
        "prompt_eval_count": run.get("prompt_tokens", 0),
        "prompt_eval_duration": _ns(run.get("prefill_s", 0.0)),
        "eval_count": run.get("new_tokens", 0),
        "eval_duration": _ns(run.get("decode_s", 0.0)),
    }


def _loaded(service: Service, said: dict[str, Any]) -> dict[str, Any]:
    return {"model": service.model_name, "created_at": _now(), **said, "done": True, "done_reason": "load"}


def _description(service: Service) -> dict[str, Any]:
    info = service.engine.info()
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": info.architecture,
        "families": [info.architecture],
        "parameter_size": "",
        "quantization_level": "",
    }
    return {"size": info.expert_bytes, "digest": "0" * 64, "details": details}


def _shown_details(service: Service, started: str) -> dict[str, Any]:
    info = service.engine.info()
    family = info.architecture
    capabilities = ["completion"]
    capabilities += ["tools"] if service.takes_tools else []
    capabilities += ["thinking"] if service.engine.vocabulary.takes("enable_thinking") else []
    return {
        "modelfile": f"FROM {service.model_name}",
        "parameters": "",
        "template": service.engine.vocabulary.chat_template,
        "details": _description(service)["details"],
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": service.engine.context_tokens,
            f"{family}.embedding_length": info.hidden_size,
            f"{family}.block_count": info.num_layers,
        },
        "capabilities": capabilities,
        "modified_at": started,
    }


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":")) + "\n"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
