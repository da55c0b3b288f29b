"""Requests of OpenAI's Responses interface; fields that are not here are those of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, Tag

from .fields import Finite, Share, Text, Whole, by_type

__all__ = [
    "FunctionCall", "FunctionCallOutput", "InputItem", "InputMessage", "Part", "Reasoning", "ReasoningItem",
    "ResponsesRequest", "TextPart", "Tool",
]  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


TextKind = Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]


class TextPart(_Model):
    """A text that was said, by whomever."""

    type: TextKind
    text: str


class Refusal(_Model):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[Refusal, Tag("refusal")],
    by_type(
        "only text goes into this server: parts of type input_text and output_text are taken",
        dict.fromkeys(get_args(TextKind), "text"),
    ),
]


class InputMessage(_Model):
    """What someone said; its type may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: str | list[Part]


class FunctionCall(_Model):
    """A function that the assistant called; `arguments` are JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class FunctionCallOutput(_Model):
    """What a function gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ReasoningItem(_Model):
    """What the assistant thought: the thoughts themselves, or else their summary."""

    type: Literal["reasoning"]
    content: list[TextPart] | None = None
    summary: list[TextPart] | None = None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    by_type(
        "items of type message, function_call, function_call_output and reasoning are taken; this server keeps none, "
        "and runs no tools",
        {None: "message"},
    ),
]


class Tool(_Model):
    """A function, all of it beside the type; or a namespace, which has functions as its `tools`."""

    type: str
    name: Text | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: list[Tool] | None = None
    external_web_access: bool | None = None


class Reasoning(_Model):
    """How hard to think; no summary is made, the thoughts come themselves."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextConfig(_Model):
    """Of what form the answer's text is to be."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(_Model):
    """`POST /v1/responses`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[InputItem]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[Whole, Field(ge=-2)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, **Finite)] | None = None
    top_p: Share | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
