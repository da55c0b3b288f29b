"""From a request of Anthropic's interface to one of `/v1/chat/completions`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .anthropic_schema import (
    Block,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from .errors import ApiError
from .openai_schema import ChatRequest
from .translation import ONE_ANSWER, Conversation, chat_request
from .unsupported import Unsupported, refuse

__all__ = ["ANTHROPIC", "PLACES", "TOOLS", "chat_of"]

PLACES = {"response_format": "output_config.format", "stop": "stop_sequences"}
"""Fields of a chat request and what they are called here."""

ANTHROPIC = (
    *ONE_ANSWER,
    Unsupported(("mcp_servers",), "this server calls no others; give the tools themselves"),
    Unsupported(("container",), "this server runs no code"),
)
"""Fields of this interface alone; all others are refused as in a chat request."""

_TAUGHT = "no model here was taught it; describe it as a tool with an input_schema"
TOOLS = {
    "web_search": "this server searches nothing",
    "web_fetch": "this server fetches nothing",
    "code_execution": "this server runs no code",
    "tool_search_tool": "give the tools themselves",
    "mcp_toolset": "this server calls no others; give the tools themselves",
    "bash": _TAUGHT,
    "text_editor": _TAUGHT,
    "computer": _TAUGHT,
    "memory": _TAUGHT,
}
"""What types of Anthropic's own tools begin with, before the date, and why they are refused."""

# What Claude Code begins its system prompt with. It changes with each request, and no prompt would be found in a cache.
_BILLING = re.compile(r"\s*x-anthropic-billing-header:(?:\s*\w+=[^;\s]*;)*\s*")


def chat_of(body: MessagesRequest, thinking: Mapping[str, Any]) -> ChatRequest:
    """Return the same request for `/v1/chat/completions`; ApiError for what this server cannot do.

    `thinking` is what the chat template is to know of it, beside what the request has for the template.
    """
    extra = dict(body.model_extra or {})
    refuse(ANTHROPIC, extra)
    choice = body.tool_choice
    own = {
        "model": body.model,
        "messages": _messages(body),
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "tools": [_function(number, tool) for number, tool in enumerate(body.tools or [])] or None,
        "tool_choice": _choice(choice) if choice else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "response_format": _response_format(body, extra.pop("output_format", None)),
    }
    options = extra.get("chat_template_kwargs") or {}
    if thinking and isinstance(options, dict):
        own["chat_template_kwargs"] = {**thinking, **options}
    return chat_request(own, extra, PLACES)


def _response_format(body: MessagesRequest, beta: Any) -> Any:
    """In chat requests a schema lies a level deeper, and has a name; `beta`: the field's name of old."""
    given = (body.output_config and body.output_config.format) or beta
    if isinstance(given, dict) and given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given.get("schema")}}
    return given


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _function(number: int, tool: Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        kind = re.sub(r"(_regex|_bm25)?_\d{8}$", "", str(tool.type))
        reason = TOOLS.get(kind, "only tools with an input_schema are")
        raise ApiError(
            400, f"tools of type {tool.type!r} are not supported: {reason}",
            param=f"tools[{number}]", code="unsupported_parameter",
        )  # fmt: skip
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _messages(body: MessagesRequest) -> list[dict[str, Any]]:
    told = Conversation()
    if body.system:
        told.system(_system(body.system))
    for number, message in enumerate(body.messages):
        _tell(told, message, f"messages[{number}]")
    if told.last_role == "assistant":
        raise ApiError(400, "an answer cannot be begun for the model here: the last message must be the user's")
    return told.messages()


def _tell(told: Conversation, message: InputMessage, place: str) -> None:
    content = message.content
    if message.role == "system":
        told.system(_system(content))
    elif isinstance(content, str):
        (told.user if message.role == "user" else told.said)([content])
    elif message.role == "user":
        _check(content, (TextBlock, ToolResultBlock), f"{place}.content")
        for block in content:
            if isinstance(block, ToolResultBlock):  # results follow their calls, whatever else the user says
                told.result(block.tool_use_id, _result(block))
        if texts := [block.text for block in content if isinstance(block, TextBlock)]:
            told.user(texts)
    else:
        _check(content, (TextBlock, ThinkingBlock, ToolUseBlock), f"{place}.content")
        for block in content:
            _tell_assistants(told, block)


def _check(content: Sequence[Block], kinds: tuple[type, ...], place: str) -> None:
    for number, block in enumerate(content):
        if not isinstance(block, kinds) and block.type != "redacted_thinking":
            raise ApiError(
                400, f"{place}[{number}]: blocks of type {block.type!r} belong to the other role",
                param=f"{place}[{number}]",
            )  # fmt: skip


def _tell_assistants(told: Conversation, block: Block) -> None:
    if isinstance(block, TextBlock):
        told.said([block.text])
    elif isinstance(block, ThinkingBlock):
        told.thoughts(block.thinking)
    elif isinstance(block, ToolUseBlock):
        told.call(block.id, block.name, json.dumps(block.input))


def _system(content: str | Sequence[Any]) -> list[str]:
    texts = [content] if isinstance(content, str) else [block.text for block in content if isinstance(block, TextBlock)]
    return [
        text for text in (_BILLING.sub("", text, count=1) if _BILLING.match(text) else text for text in texts) if text
    ]


def _result(block: ToolResultBlock) -> list[str]:
    """Chat templates have no other way to say that a tool failed."""
    parts = block.content or []
    texts = (
        [parts]
        if isinstance(parts, str)
        else [part.text if isinstance(part, TextBlock) else part.tool_name for part in parts]
    )
    return ["Error: " + "\n".join(texts)] if block.is_error else texts
