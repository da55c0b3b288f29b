"""Answers in the shape of Anthropic's interface, whole or as its events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

from hybrimoe_kt.engine.events import Event, Finished

from .answer_blocks import Begun, Block, Ended, Grown, blocks
from .errors import ApiError, error_body
from .service import Service
from .streams import sse

__all__ = ["PING", "MessagesReply", "failed"]

PING = sse({"type": "ping"}, "ping")
_SIGNATURE = "unsigned"
"""Clients keep thoughts with the signature that came with them, and send both back; here it says nothing."""


class MessagesReply:
    """Writes the answer to one request, of which `num_prompt_tokens` and `max_new_tokens` are known before."""

    def __init__(self, service: Service, *, num_prompt_tokens: int, max_new_tokens: int) -> None:
        self._vocabulary, self._max_new_tokens = service.engine.vocabulary, max_new_tokens
        self._ids: dict[int, str] = {}
        self._content: list[dict[str, Any]] = []
        self._message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage({"prompt_tokens": num_prompt_tokens}),
        }

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """Return the answer at once."""
        async for _ in self.pieces(events):
            pass
        return self._message | {"content": self._content}

    async def pieces(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the answer's events as they come."""
        yield _event("message_start", message=self._message)
        async for event in blocks(events, self._vocabulary):
            if isinstance(event, Begun):
                begun = self._block(event.block, is_new=True)
                yield _event("content_block_start", index=event.block.index, content_block=begun)
                if event.block.call is not None:
                    written = json.dumps(dict(event.block.call.arguments), ensure_ascii=False)
                    yield _delta(event.block, "input_json_delta", partial_json=written)
            elif isinstance(event, Grown):
                if event.text and event.block.kind == "thoughts":
                    yield _delta(event.block, "thinking_delta", thinking=event.text)
                elif event.text:
                    yield _delta(event.block, "text_delta", text=event.text)
            elif isinstance(event, Ended):
                self._content.append(self._block(event.block))
                if event.block.kind == "thoughts":
                    yield _delta(event.block, "signature_delta", signature=_SIGNATURE)
                yield _event("content_block_stop", index=event.block.index)
            else:
                reason = self._reason(event)
                self._message |= reason | {"usage": _usage(event.run)}
                yield _event("message_delta", delta=reason, usage=_usage(event.run))
                yield _event("message_stop")

    def _block(self, block: Block, *, is_new: bool = False) -> dict[str, Any]:
        text = "" if is_new else block.text
        if block.kind == "thoughts":
            return {"type": "thinking", "thinking": text, "signature": "" if is_new else _SIGNATURE}
        if block.call is None:
            return {"type": "text", "text": text}
        call_id = self._ids.setdefault(block.index, block.call.id or f"toolu_{secrets.token_hex(12)}")
        given = {} if is_new else dict(block.call.arguments)
        return {"type": "tool_use", "id": call_id, "name": block.call.name, "input": given}

    def _reason(self, finished: Finished) -> dict[str, Any]:
        if finished.reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if finished.reason == "length":
            is_asked = finished.run.get("new_tokens", 0) >= self._max_new_tokens
            reason = "max_tokens" if is_asked else "model_context_window_exceeded"
            return {"stop_reason": reason, "stop_sequence": None}
        stop = finished.stop_string or None
        return {"stop_reason": "stop_sequence" if stop else "end_turn", "stop_sequence": stop}


def failed(error: ApiError) -> str:
    """Return the event that says what went wrong."""
    return sse(error_body("/v1/messages", error), "error")


def _event(name: str, **content: Any) -> str:
    return sse({"type": name, **content}, name)


def _delta(block: Block, kind: str, **content: Any) -> str:
    return _event("content_block_delta", index=block.index, delta={"type": kind, **content})


def _usage(run: Mapping[str, Any]) -> dict[str, Any]:
    """`input_tokens` are those that were not read from the cache."""
    cached = run.get("reused_tokens", 0)
    return {
        "input_tokens": run.get("prompt_tokens", 0) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": run.get("new_tokens", 0),
    }
