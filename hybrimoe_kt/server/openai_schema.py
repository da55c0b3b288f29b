"""Requests in OpenAI's shape: what is understood, and within which limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ChatRequest", "CompletionRequest", "Function", "Message", "StreamOptions", "Text", "Tool", "ToolCall"]

Text = Annotated[str, Field(min_length=1)]
Finite = {"allow_inf_nan": False}


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
    arguments: str = "{}"


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

    include_usage: bool = False


class _Request(_Model):
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, **Finite)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, **Finite)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, **Finite)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, **Finite)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, **Finite)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, **Finite)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, **Finite)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: int | None = None
    user: str | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    web_search_options: dict[str, Any] | None = None


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[Annotated[int, Field(ge=0)]] | list[list[Annotated[int, Field(ge=0)]]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
