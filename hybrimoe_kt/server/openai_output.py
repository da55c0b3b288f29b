"""Answers in OpenAI's shape, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hybrimoe_kt.engine.events import Answer, Event, Finished, PromptRead, TextDelta, ToolCall
from hybrimoe_kt.engine.sampler import Sampled

from .logprobs import ShownLogprobs
from .service import Service
from .streams import sse

__all__ = ["Reply"]

_TEXTS = ("reasoning_content", "content")


class Reply:
    """Writes the answers of one request; `is_chat` tells a conversation from a plain completion.

    With `echoed`, the prompts' texts, each answer begins with its prompt, of which each has `num_answers`.
    """

    def __init__(
        self, service: Service, *, is_chat: bool, logprobs: bool, echoed: Sequence[str] = (), num_answers: int = 1
    ) -> None:
        self._vocabulary, self._num_answers = service.engine.vocabulary, num_answers
        self._is_chat, self._logprobs, self._echoed = is_chat, logprobs, echoed
        kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": service.model_name,
        }
        self._begin(0)

    def _begin(self, index: int) -> None:
        self._index, self._num_calls, self._shown = index, 0, ShownLogprobs(self._vocabulary)

    @property
    def _prompt(self) -> str:
        return self._echoed[self._index // self._num_answers] if self._echoed else ""

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """Return all answers at once."""
        choices: list[dict[str, Any]] = []
        runs: list[Mapping[str, Any]] = []
        told: list[Event] = []
        async for event in events:
            told.append(event)
            if isinstance(event, Finished):
                self._begin(len(choices))
                choices.append(self._choice(Answer.of(told)))
                runs.append(event.run)
                told = []
        return {**self._head, "choices": choices, "usage": self._usage(runs)}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._index, "finish_reason": answer.reason, "logprobs": None}
        if self._logprobs:
            told = self._told(self._prompt, answer.prompt_sampled)
            self._shown.turn()
            choice["logprobs"] = _joined(told, self._told(answer.thoughts + answer.text, answer.sampled))
        if self._is_chat:
            choice["message"] = self._message(answer)
        else:
            choice["text"] = self._prompt + answer.text
        return choice

    def _message(self, answer: Answer) -> dict[str, Any]:
        content = None if answer.tool_calls and not answer.text else answer.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if answer.thoughts:
            message["reasoning_content"] = answer.thoughts
        if answer.tool_calls:
            message["tool_calls"] = [self._call(call) for call in answer.tool_calls]
        return message

    async def pieces(self, events: AsyncIterator[Event], *, with_usage: bool) -> AsyncIterator[str]:
        """Yield the answer as server-sent events as it comes, `[DONE]` at the end."""
        role: dict[str, Any] = {"role": "assistant", "content": ""}
        if self._is_chat:
            yield self._piece(role, with_usage=with_usage)
        runs: list[Mapping[str, Any]] = []
        is_new = True
        async for event in events:
            if is_new and runs and self._is_chat:
                yield self._piece(role, with_usage=with_usage)
            if is_new and self._echoed:
                told = event.sampled if isinstance(event, PromptRead) else ()
                yield self._piece({"content": self._prompt}, logprobs=told, with_usage=with_usage)
                self._shown.turn()
            is_new = isinstance(event, Finished)
            if isinstance(event, TextDelta):
                text = {"reasoning_content" if event.is_thought else "content": event.text}
                yield self._piece(text, logprobs=event.sampled, with_usage=with_usage)
            elif isinstance(event, ToolCall):
                call = {"index": self._num_calls, **self._call(event)}
                yield self._piece({"tool_calls": [call]}, with_usage=with_usage)
            elif isinstance(event, Finished):
                yield self._piece({}, finish=event.reason, with_usage=with_usage)
                runs.append(event.run)
                self._begin(len(runs))
        if with_usage:
            yield sse({**self._piece_head, "choices": [], "usage": self._usage(runs)})
        yield "data: [DONE]\n\n"

    @property
    def _piece_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._is_chat else self._head

    def _piece(
        self, delta: dict[str, Any], *, finish: str | None = None, logprobs: Sequence[Sampled] = (), with_usage: bool
    ) -> str:
        choice: dict[str, Any] = {"index": self._index, "finish_reason": finish}
        choice |= {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        told = self._told("".join(delta.get(name, "") for name in _TEXTS), logprobs) if self._logprobs else None
        choice["logprobs"] = told if logprobs else None
        return sse({**self._piece_head, "choices": [choice], **({"usage": None} if with_usage else {})})

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._num_calls += 1
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        function = {"name": call.name, "arguments": arguments}
        return {"id": call.id or f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

    def _usage(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tokens of all answers; a prompt counts once, however many it has."""
        first = runs[:: self._num_answers]
        prompt, cached = (sum(run.get(name, 0) for run in first) for name in ("prompt_tokens", "reused_tokens"))
        new = sum(run.get("new_tokens", 0) for run in runs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _told(self, text: str, sampled: Sequence[Sampled]) -> dict[str, Any]:
        if self._is_chat:
            return {"content": self._shown.of_chat(text, sampled), "refusal": None}
        return self._shown.of_completion(text, sampled)


def _joined(prompt: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of a prompt, where it has any, and its answer."""
    return {name: (prompt[name] or []) + told if told is not None else None for name, told in answer.items()}
