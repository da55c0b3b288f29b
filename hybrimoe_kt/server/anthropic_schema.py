"""Requests of Anthropic's interface; fields that are not here are those of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Tag

from .fields import Finite, Share, Text, TopK, Whole, by_type

__all__ = [
    "Block", "InputMessage", "MessagesRequest", "OutputConfig", "TextBlock", "ThinkingBlock", "Tool", "ToolChoice",
    "ToolResultBlock", "ToolUseBlock",
]  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextBlock(_Model):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(_Model):
    """What the assistant thought; the signature that came with it is not asked for."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(_Model):
    """Thoughts that only who wrote them can read."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(_Model):
    """A tool call of the assistant."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolReference(_Model):
    """A tool that a search among them found; it is one of the request's."""

    type: Literal["tool_reference"]
    tool_name: str


_NO_TEXT = "only text goes into this server: no images, no documents and nothing found elsewhere"

Result = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[ToolReference, Tag("tool_reference")],
    by_type(_NO_TEXT),
]


class ToolResultBlock(_Model):
    """What a tool gave back."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Result] | None = None
    is_error: bool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    by_type(_NO_TEXT),
]


class InputMessage(_Model):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(_Model):
    """A tool the model may use; Anthropic's own have a type and no schema."""

    name: Text
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(_Model):
    """Whether tools are to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(_Model):
    """Whether to think; for how long is the model's own choice."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Whole | None = None


class OutputConfig(_Model):
    """How hard to try, and of what form the answer is to be."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class MessagesRequest(_Model):
    """`POST /v1/messages`, and `/v1/messages/count_tokens`, which has no length."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    stream: bool | None = None
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, **Finite)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
