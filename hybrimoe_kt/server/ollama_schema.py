"""Requests in Ollama's shape."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .fields import Finite, Penalty, Repetition, Seed, Share, Stop, Text, TopK, Whole, Window
from .openai_schema import Tool

__all__ = ["ChatRequest", "GenerateRequest", "Message", "Options", "PullRequest", "ShowRequest"]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class Options(_Model):
    """How to draw; `unsupported` knows those that are refused, all others choose among Ollama's ways to run a model."""

    model_config = ConfigDict(extra="allow")

    num_predict: Annotated[Whole, Field(ge=-2)] | None = None
    """Longest answer, tokens; -2, -1 and, as in Ollama, 0: what the context holds."""
    temperature: Annotated[float, Field(ge=0, le=100, **Finite)] | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repeat_penalty: Repetition | None = None
    repeat_last_n: Window | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None


class CalledFunction(_Model):
    """A function that the assistant called."""

    name: str
    arguments: dict[str, Any] | None = None


class ToolCall(_Model):
    """A tool call in an assistant's earlier message."""

    id: str | None = None
    function: CalledFunction


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class _Request(_Model):
    model_config = ConfigDict(extra="allow")

    model: Text
    stream: bool | None = None
    options: Options | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class ChatRequest(_Request):
    """`POST /api/chat`."""

    messages: list[Message] | None = None
    tools: list[Tool] | None = None


class GenerateRequest(_Request):
    """`POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class PullRequest(_Model):
    """`POST /api/pull`."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = None


class ShowRequest(_Model):
    """`POST /api/show`."""

    model: str | None = None
    name: str | None = None
