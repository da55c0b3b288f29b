"""Requests in Ollama's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .openai_schema import Finite, Text, Tool

__all__ = ["ChatRequest", "GenerateRequest", "Message", "Options", "ShowRequest"]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Options(_Model):
    """How to draw; Ollama's other options choose among its own ways of running a model and are ignored."""

    num_predict: Annotated[int, Field(ge=-2)] | None = None
    """Longest answer, tokens; -1 and -2: what the context holds."""
    temperature: Annotated[float, Field(ge=0, le=100, **Finite)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, **Finite)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, **Finite)] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10, **Finite)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, **Finite)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, **Finite)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None


class CalledFunction(_Model):
    """A function that the assistant called."""

    name: str
    arguments: dict[str, Any] = {}


class ToolCall(_Model):
    """A tool call in an assistant's earlier message."""

    function: CalledFunction


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None


class _Request(_Model):
    model: Text
    stream: bool = True
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: int | float | str | None = None


class ChatRequest(_Request):
    """`POST /api/chat`."""

    messages: list[Message] = []
    tools: list[Tool] | None = None


class GenerateRequest(_Request):
    """`POST /api/generate`."""

    prompt: str = ""
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None
    raw: bool = False


class ShowRequest(_Model):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None
