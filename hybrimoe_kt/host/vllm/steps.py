"""What a step is, from vLLM's forward context: how many of its rows are tokens, and whether they go on with texts."""

from __future__ import annotations

from typing import Any

from hybrimoe_kt.host.engines.experts import EngineStep

__all__ = ["StepReader"]

_TRIAL = EngineStep(is_trial=True)


class StepReader:
    """Reads each forward context once, for all layers: it has an entry for every one of them."""

    def __init__(self, *, tokens_a_request: int, sees_other_ranks: bool) -> None:
        """`tokens_a_request` that go on with a text in one step: more than one where tokens are guessed ahead.

        `sees_other_ranks`: other data-parallel ranks' tokens come here too, whose number the context does not have; and
        they do when this rank has nothing to do, so that such a step means something.
        """
        self._tokens_a_request, self._sees_other_ranks = tokens_a_request, sees_other_ranks
        self._context: Any = None
        self._step = EngineStep()

    def step(self, context: Any) -> EngineStep:
        """The step under way."""
        if context is not self._context:
            self._context, self._step = context, self._read(context)
        return self._step

    def _read(self, context: Any) -> EngineStep:
        metadata = context.attn_metadata
        if not metadata:
            return EngineStep(phase="decode") if self._sees_other_ranks else _TRIAL
        if context.is_padding is not None and bool(context.is_padding.all()):  # graphs are being captured
            return EngineStep(phase="decode") if self._sees_other_ranks else _TRIAL
        found = list(metadata.values())
        longest = max((getattr(each, "max_query_len", 0) or 0 for each in found), default=0)
        has_prompts = any(getattr(each, "num_prefills", 0) for each in found) if not longest else False
        is_decode = longest <= self._tokens_a_request and not has_prompts
        rows = next((n for each in found if (n := getattr(each, "num_actual_tokens", None)) is not None), None)
        return EngineStep(None if self._sees_other_ranks else rows, "decode" if is_decode else "prefill")
