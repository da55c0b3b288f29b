"""Ollama's endpoints, as far as its clients need them: chat, generate, and what is served."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hybrimoe_kt.engine.chat.thinking import switch_options, takes_thinking
from hybrimoe_kt.engine.events import Answer, Event, Finished, TextDelta, ToolCall
from hybrimoe_kt.engine.sampler import Sampled
from hybrimoe_kt.engine.sampling import Sampling

from .errors import ApiError, Json, as_api_error
from .forms import format_constraint
from .logprobs import ShownLogprobs
from .ollama_schema import ChatRequest, GenerateRequest, Message, Options, PullRequest, ShowRequest
from .service import ChatInput, Events, Service
from .streams import EventStream, whole_response
from .unsupported import OLLAMA, refuse

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

    @router.post("/api/pull")
    async def pull(body: PullRequest) -> Response:
        _check_model(service, body.model or body.name or "")
        done = _line({"status": "success"})  # it is here already
        is_whole = body.stream is False
        return Response(done, media_type="application/json" if is_whole else "application/x-ndjson")

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
        prompt = body.prompt
        if not prompt:
            return Json(_loaded(service, {"response": ""}))
        if body.raw:
            return await _respond(service, request, body, lambda *how: service.complete([prompt], *how), _in_response)
        system = [{"role": "system", "content": body.system}] if body.system else []
        given = ChatInput(
            messages=[*system, {"role": "user", "content": prompt}],
            template_options=_thinking(service, body.think),
        )
        return await _respond(service, request, body, lambda *how: service.chat(given, *how), _in_response)

    return router


def _check(service: Service, body: ChatRequest | GenerateRequest) -> None:
    _check_model(service, body.model)
    options = body.options.model_extra if body.options else None
    refuse(OLLAMA, {**(options or {}), **(body.model_extra or {})})
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true")


def _check_model(service: Service, name: str) -> None:
    try:
        service.check_model(name)
    except ApiError:
        raise ApiError(404, f"model {name!r} not found; the one served is {service.model_name!r}") from None


def _thinking(service: Service, think: bool | str | None) -> dict[str, Any]:
    if think is None:
        return {}
    takes = service.engine.vocabulary.takes
    options = switch_options(takes, is_on=bool(think))
    if takes("reasoning_effort") and isinstance(think, str):
        return {**(options or {}), "reasoning_effort": think}
    if options is None and think and not takes_thinking(takes):
        raise ApiError(400, f"{service.model_name!r} does not support thinking")
    return options or {}


def _message(message: Message) -> dict[str, Any]:
    refuse(OLLAMA, {"images": message.images})
    shown: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking is not None:
        shown["reasoning_content"] = message.thinking
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.tool_name is not None:
        shown["name"] = message.tool_name
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments or {}},
            }
            for call in message.tool_calls
        ]
    return shown


def _how(service: Service, body: ChatRequest | GenerateRequest) -> tuple[Sampling, tuple[str, ...]]:
    settings, options = service.settings, body.options or Options()
    sampling = Sampling(
        max_new_tokens=service.longest_answer(options.num_predict or None),
        temperature=settings.temperature if options.temperature is None else options.temperature,
        top_p=settings.top_p if options.top_p is None else options.top_p,
        top_k=max(0, options.top_k or 0),
        min_p=options.min_p or 0.0,
        repetition_penalty=1.0 if options.repeat_penalty is None else options.repeat_penalty,
        frequency_penalty=options.frequency_penalty or 0.0,
        presence_penalty=options.presence_penalty or 0.0,
        penalty_window=service.penalty_window(options.repeat_last_n),
        seed=settings.seed if options.seed is None else options.seed,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=format_constraint((body.model_extra or {}).get("format")),
    )
    given = [options.stop] if isinstance(options.stop, str) else options.stop or []
    return sampling, tuple(filter(None, given))


async def _respond(
    service: Service,
    request: Request,
    body: ChatRequest | GenerateRequest,
    begin: Callable[..., Any],
    shape: Callable[..., dict[str, Any]],
) -> Response:
    began = time.perf_counter()
    events: Events = await begin(*_how(service, body))
    if body.stream is not False:
        lines = _lines(service, aiter(events), shape, began)
        return EventStream(lines, events, media_type="application/x-ndjson")
    return await whole_response(request, events, _whole(service, aiter(events), shape, began))


async def _lines(
    service: Service, events: AsyncIterator[Event], shape: Callable[..., dict[str, Any]], began: float
) -> AsyncIterator[str]:
    told = ShownLogprobs(service.engine.vocabulary)
    try:
        async for event in events:
            head = {"model": service.model_name, "created_at": _now()}
            if isinstance(event, Finished):
                yield _line(head | shape() | _ending(event.reason, event.run, began))
            elif isinstance(event, ToolCall):
                yield _line(head | shape(calls=[_shown_call(event)]) | {"done": False})
            elif isinstance(event, TextDelta) and (event.text or event.sampled):
                said = {"thoughts" if event.is_thought else "text": event.text}
                yield _line(head | shape(**said) | _logprobs(told, event.text, event.sampled) | {"done": False})
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
    told = ShownLogprobs(service.engine.vocabulary)
    said |= _logprobs(told, answer.thoughts + answer.text, answer.sampled)
    return head | said | _ending(answer.reason, answer.run, began)


def _logprobs(told: ShownLogprobs, text: str, sampled: Sequence[Sampled]) -> dict[str, Any]:
    shown = told.of_chat(text, sampled)
    return {"logprobs": shown} if shown else {}


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
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"id": call.id, "function": function} if call.id else {"function": function}


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
    capabilities += ["thinking"] if takes_thinking(service.engine.vocabulary.takes) else []
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
