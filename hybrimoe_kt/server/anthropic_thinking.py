"""How Anthropic's words for thinking are told to a chat template, which may have none, others, or a few of them."""

from __future__ import annotations

import re
from typing import Any

from hybrimoe_kt.engine.chat.thinking import EFFORTS, switch_options

from .anthropic_schema import MessagesRequest
from .errors import ApiError
from .service import ChatInput, Service

__all__ = ["Thinking"]

_SCALE = ("none", "low", "medium", "high", "xhigh", "max")
_HELLO = [{"role": "user", "content": "hello"}]


class Thinking:
    """Options for one model's chat template. Agents set all of this unasked, so nothing is refused."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._nearest: dict[str, str | None] = {}

    async def options(self, body: MessagesRequest) -> dict[str, Any]:
        """Return what the chat template is to know."""
        takes = self._service.engine.vocabulary.takes
        kind = body.thinking.type if body.thinking else "adaptive"
        options = {} if kind == "adaptive" else switch_options(takes, is_on=kind == "enabled") or {}
        effort = body.output_config.effort if body.output_config else None
        if effort is None and kind == "disabled" and not options:
            effort = "none"
        if effort in _SCALE and takes("reasoning_effort") and (taken := await self._effort(effort)) is not None:
            options["reasoning_effort"] = taken
        return options

    async def _effort(self, wanted: str) -> str | None:
        """The effort nearest to `wanted` that the template, which is a program and hence tried, does not refuse."""
        if wanted not in self._nearest:
            self._nearest[wanted] = await self._find(wanted)
        return self._nearest[wanted]

    async def _find(self, wanted: str) -> str | None:
        template = self._service.engine.vocabulary.chat_template
        known = [one for one in _SCALE if one in EFFORTS or re.search(rf"""['"]{one}['"]""", template)]
        others = [one for one in known if one != "none"] if wanted != "none" else ["none"]
        place = _SCALE.index(wanted)
        for effort in sorted(others, key=lambda one: abs(_SCALE.index(one) - place)):
            given = ChatInput(messages=_HELLO, template_options={"reasoning_effort": effort})
            try:
                await self._service.num_chat_tokens(given)
            except ApiError:
                continue
            return effort
        return None
