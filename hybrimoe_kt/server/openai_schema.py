"""Requests in OpenAI's shape: what is understood, and within which limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .fields import Biases, Finite, Penalty, Repetition, Seed, Share, Stop, Text, TopK, Whole, Window

__all__ = ["ChatRequest", "CompletionRequest", "Function", "Message", "StreamOptions", "Tool", "ToolCall"]

Length = Annotated[Whole, Field(ge=-2)]
"""Tokens, 0 for none; -1 and -2: what the context holds."""
Answers = Annotated[Whole, Field(ge=1, le=16)]
"""Answers to one prompt."""
Token = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    """Fields that no one here knows are ignored, as new clients send new ones."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Model):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class CalledFunction(_Model):
    """A function that the assistant called; `arguments` are JSON text."""

    name: str
    arguments: str | None = None


class ToolCall(_Model):
    """A tool call in an assistant's earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    function_call: None = None
    audio: None = None


class Function(_Model):
    """A function the model may call; `parameters` are a JSON schema."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    """A tool the model may use."""

    type: Literal["function"]
    function: Function


class StreamOptions(_Model):
    """With `include_usage` the last piece of a stream tells the tokens it took."""

    include_usage: bool | None = None


class _Request(_Model):
    """What both have; `unsupported` knows the fields that are refused, all others choose nothing here."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    n_predict: Length | None = None
    temperature: Annotated[float, Field(ge=0, le=2, **Finite)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    repeat_penalty: Repetition | None = None
    repeat_last_n: Window | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None
    n: Answers | None = None
    n_cmpl: Answers | None = None


class Thinking(_Model):
    """Whether to think, as some services spell it."""

    type: Literal["enabled", "disabled"]


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking: bool | Thinking | None = None


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
