"""Steps of several conversations on an accelerator, captured as those of one are: what they read stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hybrimoe_kt.host.hf.loading import LoadedModel

from .captured_loop import CapturedLoop
from .captured_steps import CapturedSteps

__all__ = ["CapturedRows", "FixedRows"]

_MASKED = {"full_attention", "linear_attention"}
"""Kinds of layers that one mask is for."""


class FixedRows(Protocol):
    """The memory of conversations that step together; `JointRows` has one."""

    number: int
    """No other memory's."""
    room: int
    """Columns that there is memory for."""
    column: int
    """Where every row's next token goes."""
    starts: Sequence[int]
    """Where each row begins."""
    cache: Any
    """What the model is given."""

    def fix(self, position: torch.Tensor | None) -> None:
        """Write at `position`, int64 `[1]` on the device, from now on, and hand out all columns; None: no more."""


class CapturedRows:
    """Like `CapturedLoop`, for a token of each of several conversations."""

    def __init__(self, loaded: LoadedModel, loop: CapturedLoop) -> None:
        self._loaded, self._loop = loaded, loop
        model: Any = loaded.model
        self._model, self._embedding = model, model.get_input_embeddings()
        self._captured: dict[int, CapturedSteps] = {}
        """By number of rows: what is sent to the host has room for so many."""
        device = model.device
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._starts = torch.empty(0, dtype=torch.int64, device=device)
        self._places = torch.empty(0, dtype=torch.int64, device=device)
        self._given: dict[str, torch.Tensor] = {}
        self._logits = torch.empty(0)
        self._rows_number = -1

    @staticmethod
    def takes(loaded: LoadedModel, loop: object) -> bool:
        """Whether such steps can be captured: where those of one are, and every layer sees all that it holds."""
        if not isinstance(loop, CapturedLoop):
            return False
        config: Any = loaded.model.config
        kinds = set(getattr(config, "layer_types", None) or ()) - _MASKED
        has_window = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
        return not kinds and not has_window and config._attn_implementation == "sdpa"

    def step(self, tokens: torch.Tensor, rows: FixedRows) -> torch.Tensor:
        """Append `tokens [rows, 1]`; logits float32 `[rows, vocab]` on the CPU. CaptureError as of `CapturedLoop`."""
        with self._loop.accelerator.model_stream():
            self._place(tokens, rows)
            rows.fix(self._position)
            try:
                self._of(len(tokens)).compute((rows.number, 0), lambda: self._ask(rows))
            finally:
                rows.fix(None)
            return self._logits[:, -1].float().cpu()

    @property
    def num_captures(self) -> int:
        """Since the model was loaded."""
        return sum(captured.num_captures for captured in self._captured.values())

    def _of(self, num_rows: int) -> CapturedSteps:
        found = self._captured.get(num_rows)
        if found is None:
            found = self._captured[num_rows] = CapturedSteps(self._loaded, self._loop.accelerator, captures=True)
        found.captures = self._loop.captures
        return found

    def forget(self) -> None:
        """Let go of what was captured, and its memory."""
        for captured in self._captured.values():
            captured.forget()
        self._given.clear()
        self._logits = torch.empty(0)

    def _place(self, tokens: torch.Tensor, rows: FixedRows) -> None:
        """Write what differs from step to step, where a captured one reads it."""
        device = self._position.device
        if self._rows_number != rows.number:
            self._rows_number = rows.number
            self._given = {}
            self._starts = torch.tensor(list(rows.starts), device=device)
            self._places = torch.arange(rows.room, device=device)
        self._position.fill_(rows.column)
        if getattr(self._embedding, "reads_on_host", False):
            embedded = self._embedding(tokens)
            self._given.setdefault("inputs_embeds", torch.empty_like(embedded)).copy_(embedded)
        else:
            self._given.setdefault("input_ids", torch.zeros_like(tokens, device=device)).copy_(tokens)

    def _ask(self, rows: FixedRows) -> None:
        """Have the modules enqueue the step."""
        seen = (self._places <= self._position) & (self._places >= self._starts[:, None])
        output = self._model(
            **self._given,
            **{self._loaded.cache_name: rows.cache},
            attention_mask=seen[:, None, None],
            position_ids=self._position - self._starts[:, None],
            use_cache=True,
            logits_to_keep=1,
        )
        self._logits = output.logits
