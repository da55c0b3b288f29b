"""From another interface's request to one of `/v1/chat/completions`, which knows what is taken and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hybrimoe_kt.engine.sampling import Sampling

from .errors import ApiError, invalid_request
from .openai_input import chat_input, sampling_of, stops_of
from .openai_schema import ChatRequest
from .service import Events, Service
from .unsupported import Unsupported

__all__ = ["ONE_ANSWER", "Conversation", "begin", "chat_request"]


_DEEPER = 50
"""Levels that an answer may stand above what it has of the request, with the calls around its writing."""

ONE_ANSWER = (
    Unsupported(("n", "best_of", "n_cmpl"), "an answer has one choice in this interface", lambda value: value == 1),
)


def chat_request(own: Mapping[str, Any], extra: Mapping[str, Any], places: Mapping[str, str]) -> ChatRequest:
    """Return the chat request that an interface's own fields make, None left out, and any others of chat requests.

    `places` has for a field of the chat request what its clients call it.
    """
    given = {**extra, **{name: value for name, value in own.items() if value is not None}}
    _check_json(given)
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        found = [
            {**one, "loc": (places.get(str(one["loc"][0]), one["loc"][0]), *one["loc"][1:])} for one in error.errors()
        ]
        body = {places.get(name, name): value for name, value in given.items()}
        raise invalid_request(found, body) from None


def _check_json(given: Any) -> None:
    """ApiError for what can be read and not be written again, where answers have it once more."""
    deeper = given
    for _ in range(_DEEPER):
        deeper = [deeper]
    try:
        json.dumps(deeper, allow_nan=False)
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None
    except ValueError:
        raise ApiError(400, "NaN and Infinity are no JSON") from None


async def begin(service: Service, chat: ChatRequest) -> tuple[Events, Sampling]:
    """Begin to answer; ApiError for what cannot be done."""
    given, sampling = chat_input(chat, service), sampling_of(service, chat)
    return await service.chat(given, sampling, stops_of(chat)), sampling


class Conversation:
    """Gathers the messages of a chat request from pieces that follow one another.

    Pieces of one role are one message, as most chat templates want the roles to take turns. A system's words after the
    beginning, where many refuse them, stand with the user's next to them or with a tool's result: the beginning of the
    prompt stays as it was, and is not read anew.
    """

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []

    def system(self, texts: Sequence[str]) -> None:
        """Texts of the system or developer; none are no message."""
        if not texts:
            return
        role = self._messages[-1]["role"] if self._messages else "system"
        self._add({"assistant": "user"}.get(role, role), texts)

    def user(self, texts: Sequence[str]) -> None:
        """Texts of the user; without any there is a message nonetheless."""
        self._add("user", texts)

    def result(self, call_id: str | None, texts: Sequence[str]) -> None:
        """What a tool said."""
        self._messages.append({"role": "tool", "content": [], "tool_call_id": call_id})
        self._add("tool", texts)

    def thoughts(self, text: str) -> None:
        """What the assistant thought; nothing, where only its maker can read it."""
        if not text:
            return
        turn = self._turn("assistant")
        turn["reasoning_content"] = "\n".join([*filter(None, [turn.get("reasoning_content")]), text])

    def said(self, texts: Sequence[str]) -> None:
        """Texts of the assistant."""
        self._add("assistant", texts)

    def call(self, call_id: str | None, name: str, arguments: str) -> None:
        """A tool call of the assistant; `arguments` are JSON text."""
        function = {"name": name, "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        self._turn("assistant").setdefault("tool_calls", []).append(call)

    @property
    def last_role(self) -> str:
        """Whose message is the last; empty where there is none."""
        return str(self._messages[-1]["role"]) if self._messages else ""

    def messages(self) -> list[dict[str, Any]]:
        """The messages of a chat request."""
        return [{**message, "content": _content(message["content"])} for message in self._messages]

    def _add(self, role: str, texts: Sequence[str]) -> None:
        self._turn(role)["content"] += texts

    def _turn(self, role: str) -> dict[str, Any]:
        if self.last_role != role:
            self._messages.append({"role": role, "content": []})
        return self._messages[-1]


def _content(texts: Sequence[str]) -> str | list[dict[str, str]]:
    return "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]
