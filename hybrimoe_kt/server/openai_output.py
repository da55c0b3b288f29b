"""Answers in OpenAI's shape, whole or in pieces."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hybrimoe_kt.engine.events import Answer, Event, TextDelta, ToolCall
from hybrimoe_kt.engine.sampler import Sampled

from .service import Service

__all__ = ["Reply"]


class Reply:
    """Writes one answer; `is_chat` tells a conversation from a plain completion."""

    def __init__(self, service: Service, *, is_chat: bool, logprobs: bool) -> None:
        self._vocabulary = service.engine.vocabulary
        self._is_chat, self._logprobs = is_chat, logprobs
        self._num_calls = 0
        self._offset = 0
        kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": service.model_name,
        }

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """Return the whole answer at once."""
        answer = Answer.of([event async for event in events])
        choice: dict[str, Any] = {"index": 0, "finish_reason": answer.reason}
        choice["logprobs"] = self._shown_logprobs(answer.sampled) if self._logprobs else None
        if self._is_chat:
            choice["message"] = self._message(answer)
        else:
            choice["text"] = answer.text
        return {**self._head, "choices": [choice], "usage": _usage(answer.run)}

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
        if self._is_chat:
            yield self._piece({"role": "assistant", "content": ""}, with_usage=with_usage)
        async for event in events:
            if isinstance(event, TextDelta):
                text = {"reasoning_content" if event.is_thought else "content": event.text}
                yield self._piece(text, logprobs=event.sampled, with_usage=with_usage)
            elif isinstance(event, ToolCall):
                call = {"index": self._num_calls, **self._call(event)}
                yield self._piece({"tool_calls": [call]}, with_usage=with_usage)
            else:
                yield self._piece({}, finish=event.reason, with_usage=with_usage)
                if with_usage:
                    yield _sse({**self._piece_head, "choices": [], "usage": _usage(event.run)})
        yield "data: [DONE]\n\n"

    @property
    def _piece_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._is_chat else self._head

    def _piece(
        self, delta: dict[str, Any], *, finish: str | None = None, logprobs: Sequence[Sampled] = (), with_usage: bool
    ) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"delta": delta} if self._is_chat else {"text": delta.get("content", "")}
        choice["logprobs"] = self._shown_logprobs(logprobs) if logprobs else None
        return _sse({**self._piece_head, "choices": [choice], **({"usage": None} if with_usage else {})})

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._num_calls += 1
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        function = {"name": call.name, "arguments": arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

    def _shown_logprobs(self, sampled: Sequence[Sampled]) -> dict[str, Any]:
        if self._is_chat:
            content = [
                self._token(one.token, one.logprob)
                | {"top_logprobs": [self._token(token, logprob) for token, logprob in one.likeliest]}
                for one in sampled
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(one.token) for one in sampled]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in sampled],
            "top_logprobs": [{self._text(token): logprob for token, logprob in one.likeliest} for one in sampled],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        # a token may be a part of a character, which has no text of its own
        return {"token": text, "logprob": logprob, "bytes": None if "�" in text else list(text.encode())}

    def _text(self, token: int) -> str:
        return self._vocabulary.text_of(token)


def _usage(run: Mapping[str, Any]) -> dict[str, Any]:
    prompt, new = run.get("prompt_tokens", 0), run.get("new_tokens", 0)
    cached = run.get("reused_tokens", 0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _sse(content: Any) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
