"""Where turns of a conversation begin: what later prompts are likely to begin with as well."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from hybrimoe_kt.engine.memory.conversation import common_length
from hybrimoe_kt.errors import ModelError

__all__ = ["NO_TURNS", "Leads", "Turns"]

_LEAST_TOKENS = 128
"""Below which a lead is not worth the copy of a model's states, up to 75 MB. A choice."""
_MOST_KNOWN = 16
"""Leads remembered, the latest used: agents that share a server have a few."""


class Turns(NamedTuple):
    """Lengths of a prompt that a conversation of recurrent states should be able to go back to; 0 for none."""

    lead: int = 0
    """Of the system message and the tools, which other conversations begin with."""
    answer: int = 0
    """Of all before the answer's turn, which later prompts of this one have, and perhaps not what follows."""


NO_TURNS = Turns()


class Leads:
    """Tells how many tokens of a prompt say no more than its system message and tools."""

    def __init__(self, chat_ids: Callable[[Sequence[Mapping[str, Any]], Any, Any], list[int]]) -> None:
        """`chat_ids` as of `Vocabulary`."""
        self._chat_ids = chat_ids
        self._known: OrderedDict[str, list[int]] = OrderedDict()

    def length(
        self,
        prompt: Sequence[int],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any] | None,
    ) -> int:
        """How many of the tokens that `messages`, `tools` and a template's `options` have become; 0 for few."""
        first = list(takewhile(lambda message: message.get("role") in ("system", "developer"), messages))
        if not first and not tools:
            return 0
        key = json.dumps([first, tools, options], sort_keys=True, default=str)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._shared(first, tools, options)
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        is_so = _LEAST_TOKENS <= len(found) < len(prompt) and list(prompt[: len(found)]) == found
        return len(found) if is_so else 0

    def _shared(self, first: list[Mapping[str, Any]], tools: Any, options: Any) -> list[int]:
        """What two conversations have in common that differ from their first question on."""
        try:
            one, other = (self._chat_ids([*first, {"role": "user", "content": text}], tools, options) for text in "aZ")
        except ModelError:  # the template wants something else
            return []
        return one[: common_length(one, other)]
