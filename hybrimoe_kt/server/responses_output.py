"""Answers in the shape of the Responses interface, whole or as its events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from hybrimoe_kt.engine.events import Event, Finished
from hybrimoe_kt.engine.sampling import Sampling

from .answer_blocks import Begun, Block, Ended, Grown, blocks
from .errors import ApiError
from .responses_schema import ResponsesRequest
from .responses_tools import namespaces
from .service import Service
from .streams import sse

__all__ = ["ResponsesReply"]

_PREFIXES = {"thoughts": "rs", "text": "msg", "call": "fc"}
_PARTS = {"thoughts": "reasoning_text", "text": "output_text"}


class ResponsesReply:
    """Writes the answer to one request."""

    def __init__(self, service: Service, body: ResponsesRequest, sampling: Sampling) -> None:
        self._service = service
        self._number = 0
        self._ids: list[str] = []
        self._output: list[dict[str, Any]] = []
        self._thoughts = ""
        self._namespaces = namespaces(body.tools or [])
        self._response: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": service.model_name,
            "output": [],
            "usage": None,
            **_echoed(body, sampling),
        }

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """Return the answer at once."""
        async for _ in self.pieces(events):
            pass
        return self._response

    async def pieces(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the answer's events as they come; the last one has all of it."""
        yield self._lifecycle("created")
        yield self._lifecycle("in_progress")
        async for event in blocks(events, self._service.engine.vocabulary):
            if isinstance(event, Begun):
                for piece in self._begun(event.block):
                    yield piece
            elif isinstance(event, Grown):
                yield self._grown(event)
            elif isinstance(event, Ended):
                for piece in self._ended(event.block, "incomplete" if event.is_cut else "completed"):
                    yield piece
            else:
                await self._finish(event)
                yield self._lifecycle(self._response["status"])

    def failed(self, error: ApiError) -> str:
        """Return the event that says what went wrong."""
        shown = {"code": error.code if error.status < 500 else "server_error", "message": error.message}
        self._response |= {"status": "failed", "error": shown, "output": self._output}
        return self._lifecycle("failed")

    def _begun(self, block: Block) -> list[str]:
        self._ids.append(f"{_PREFIXES[block.kind]}_{secrets.token_hex(12)}")
        added = self._event("output_item.added", block, item=self._item(block, "in_progress"))
        if block.call is not None:
            delta = self._event("function_call_arguments.delta", block, delta=_arguments(block))
            done = self._event("function_call_arguments.done", block, arguments=_arguments(block))
            return [added, delta, done]
        return [added, self._event("content_part.added", block, content_index=0, part=_part(block, is_empty=True))]

    def _grown(self, grown: Grown) -> str:
        told: dict[str, Any] = {"logprobs": grown.logprobs} if grown.block.kind == "text" else {}
        name = f"{_PARTS[grown.block.kind]}.delta"
        return self._event(name, grown.block, content_index=0, delta=grown.text, **told)

    def _ended(self, block: Block, status: str) -> list[str]:
        item = self._item(block, status)
        self._output.append(item)
        done = []
        if block.call is None:
            self._thoughts += block.text if block.kind == "thoughts" else ""
            told: dict[str, Any] = {"logprobs": block.logprobs} if block.kind == "text" else {}
            done = [
                self._event(f"{_PARTS[block.kind]}.done", block, content_index=0, text=block.text, **told),
                self._event("content_part.done", block, content_index=0, part=_part(block)),
            ]
        return [*done, self._event("output_item.done", block, item=item)]

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        is_new = status == "in_progress"
        item: dict[str, Any] = {"id": self._ids[block.index], "status": status}
        if block.call is not None:
            call_id = block.call.id or self._ids[block.index].replace("fc_", "call_")
            namespace, name = self._namespaces.get(block.call.name, ("", block.call.name))
            item |= {"call_id": call_id, "name": name, **({"namespace": namespace} if namespace else {})}
            return {"type": "function_call", **item, "arguments": "" if is_new else _arguments(block)}
        content = [] if is_new else [_part(block)]
        if block.kind == "thoughts":
            return {"type": "reasoning", **item, "summary": [], "content": content}
        return {"type": "message", **item, "role": "assistant", "content": content}

    async def _finish(self, finished: Finished) -> None:
        is_cut = finished.reason == "length"
        num_thoughts = await self._service.num_text_tokens(self._thoughts)
        self._response |= {
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(time.time()),
            "output": self._output,
            "usage": _usage(finished.run, num_thoughts),
        }

    def _lifecycle(self, status: str) -> str:
        return self._sse(status, response=self._response)

    def _event(self, name: str, block: Block, **more: Any) -> str:
        own = {} if "item" in more else {"item_id": self._ids[block.index]}
        return self._sse(name, output_index=block.index, **own, **more)

    def _sse(self, name: str, **content: Any) -> str:
        kind = f"response.{name}"
        number, self._number = self._number, self._number + 1
        return sse({"type": kind, "sequence_number": number, **content}, kind)


def _echoed(body: ResponsesRequest, sampling: Sampling) -> dict[str, Any]:
    """What the request chose, or what was chosen where it did not say."""
    reasoning, text = body.reasoning, body.text
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": {
            "format": (text and text.format) or {"type": "text"},
            "verbosity": (text and text.verbosity) or "medium",
        },
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or []],
        "top_logprobs": sampling.num_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _arguments(block: Block) -> str:
    return json.dumps(dict(block.call.arguments) if block.call else {}, ensure_ascii=False)


def _part(block: Block, *, is_empty: bool = False) -> dict[str, Any]:
    text = "" if is_empty else block.text
    if block.kind == "thoughts":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [] if is_empty else block.logprobs}


def _usage(run: Mapping[str, Any], num_thoughts: int) -> dict[str, Any]:
    prompt, new, cached = (run.get(name, 0) for name in ("prompt_tokens", "new_tokens", "reused_tokens"))
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": min(num_thoughts, new)},
        "total_tokens": prompt + new,
    }
