"""From a request in OpenAI's shape to what the service takes; what cannot be done is refused, never dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hybrimoe_kt.engine.sampling import Sampling

from .errors import ApiError
from .openai_schema import ChatRequest, CompletionRequest, Message
from .service import ChatInput, Service

__all__ = ["chat_input", "completion_prompt", "sampling_of", "stops_of"]

_REFUSED = ("audio", "functions", "function_call", "web_search_options")


def chat_input(request: ChatRequest) -> ChatInput:
    """Return the conversation; ApiError for what this server cannot do."""
    _refuse(request, _REFUSED)
    if request.modalities not in (None, ["text"]):
        raise _unsupported("modalities", "only text comes out of this server")
    if (request.response_format or {"type": "text"}).get("type") != "text":
        raise _unsupported("response_format", "answers cannot be held to a format here; ask for it in the prompt")
    if request.tool_choice not in (None, "auto", "none"):
        raise _unsupported("tool_choice", 'a tool call cannot be forced here; give "auto" or "none"')
    tools = [] if request.tool_choice == "none" else request.tools or []
    return ChatInput(
        messages=[_message(number, message) for number, message in enumerate(request.messages)],
        tools=[tool.model_dump(exclude_none=True) for tool in tools],
        template_options=request.chat_template_kwargs or {},
        one_call=request.parallel_tool_calls is False,
    )


def _message(number: int, message: Message) -> dict[str, Any]:
    param = f"messages[{number}]"
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{param} has no content", param=f"{param}.content")
    content = message.content or ""
    given = content if isinstance(content, str) else [part.model_dump() for part in content]
    shown: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": given}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            shown[name] = value
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _called(call.function, f"{param}.tool_calls")}
            for call in message.tool_calls
        ]
    return shown


def _called(function: Any, param: str) -> dict[str, Any]:
    """Chat templates want the arguments as an object."""
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        raise ApiError(400, f"the arguments of {function.name!r} are not JSON", param=param) from None
    return {"name": function.name, "arguments": arguments}


def completion_prompt(request: CompletionRequest) -> str | list[int]:
    """Return the one prompt, text or token ids."""
    if request.best_of not in (None, 1):
        raise _unsupported("best_of", "one answer at a time is given here")
    if request.echo:
        raise _unsupported("echo", "put the prompt before the answer yourself")
    _refuse(request, ("suffix",))
    prompt = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return prompt
    if len(prompt) != 1:
        raise _unsupported("prompt", f"one prompt a request is answered here, not {len(prompt)}")
    return prompt[0]  # type: ignore[return-value]


def sampling_of(service: Service, request: ChatRequest | CompletionRequest) -> Sampling:
    """Return how to draw; what the request leaves out is the server's default."""
    if request.n not in (None, 1):
        raise _unsupported("n", "one answer at a time is given here")
    settings = service.settings
    wanted = getattr(request, "max_completion_tokens", None) or request.max_tokens
    return Sampling(
        max_new_tokens=service.longest_answer(wanted),
        temperature=_given(request.temperature, settings.temperature),
        top_p=_given(request.top_p, settings.top_p),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        repetition_penalty=_given(request.repetition_penalty, 1.0),
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_biases(request.logit_bias or {}),
        seed=_given(request.seed, settings.seed),
        num_logprobs=_num_logprobs(request),
    )


def _num_logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


def _biases(given: dict[str, float]) -> dict[int, float]:
    for name in given:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise ApiError(400, f"logit_bias names a token by its id, not by {name!r}", param="logit_bias")
    return {int(name): bias for name, bias in given.items()}


def stops_of(request: ChatRequest | CompletionRequest) -> tuple[str, ...]:
    """Return the stop strings."""
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse(request: Any, names: Iterable[str]) -> None:
    for name in names:
        if getattr(request, name) not in (None, [], {}, "", "none"):
            raise _unsupported(name, "this server does not know it")


def _unsupported(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param} is not supported: {reason}", param=param, code="unsupported_parameter")
