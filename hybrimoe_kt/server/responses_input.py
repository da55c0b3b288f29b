"""From a request of the Responses interface to one of `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ApiError
from .openai_schema import ChatRequest
from .responses_schema import (
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputMessage,
    Part,
    ResponsesRequest,
    TextPart,
)
from .responses_tools import functions, joined
from .translation import ONE_ANSWER, Conversation, chat_request
from .unsupported import Unsupported, refuse

__all__ = ["LOGPROBS", "PLACES", "RESPONSES", "chat_of"]

PLACES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
"""Fields of a chat request and what they are called here."""
LOGPROBS = "message.output_text.logprobs"
"""What `include` names to have them."""

_KEPT = "this server keeps no responses; send the whole conversation as input"

RESPONSES = (
    *ONE_ANSWER,
    Unsupported(("previous_response_id", "conversation"), _KEPT),
    Unsupported(("background",), "an answer is given while one waits for it here, or streamed"),
    Unsupported(("prompt",), "this server keeps no prompts; send instructions and input"),
    Unsupported(
        ("truncation",),
        "a conversation that does not fit is refused rather than cut",
        lambda value: value == "disabled",
    ),
    Unsupported(("context_management",), "a conversation is read as it is sent"),
)
"""Fields of this interface alone; all others are refused as in a chat request."""


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """Return the same request for `/v1/chat/completions`; ApiError for what this server cannot do."""
    extra = body.model_extra or {}
    refuse(RESPONSES, extra)
    own = {
        "model": body.model,
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": functions(body.tools or []) or None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "verbosity": body.text.verbosity if body.text else None,
        "response_format": _response_format(body.text.format if body.text else None),
        **_logprobs(body),
    }
    return chat_request(own, extra, PLACES)


def _logprobs(body: ResponsesRequest) -> dict[str, Any]:
    is_wanted = LOGPROBS in (body.include or ())
    if body.top_logprobs and not is_wanted:
        raise ApiError(400, f'top_logprobs needs "{LOGPROBS}" in include', param="top_logprobs")
    return {"logprobs": True, "top_logprobs": body.top_logprobs} if is_wanted else {}


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """In chat requests a schema and its name lie a level deeper."""
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _choice(given: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """In chat requests a function's name lies a level deeper."""
    if isinstance(given, dict) and given.get("type") == "function" and "name" in given:
        return {"type": "function", "function": {"name": given["name"]}}
    return given


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    told = Conversation()
    if body.instructions:
        told.system([body.instructions])
    if isinstance(body.input, str):
        told.user([body.input])
    else:
        for item in body.input:
            _tell(told, item)
    return told.messages()


def _tell(told: Conversation, item: InputItem) -> None:
    if isinstance(item, InputMessage):
        says = {"user": told.user, "assistant": told.said}.get(item.role, told.system)
        says(_texts(item.content))
    elif isinstance(item, FunctionCall):
        told.call(item.call_id, joined(item.namespace, item.name), item.arguments)
    elif isinstance(item, FunctionCallOutput):
        told.result(item.call_id, _texts(item.output))
    else:
        told.thoughts("".join(_texts(item.content or item.summary or [])))


def _texts(content: str | Sequence[Part]) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, TextPart) else part.refusal for part in content]
