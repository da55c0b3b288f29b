"""Recorder: collects a running model's routing, layer by layer, into a Trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe_kt.core.types import LayerSpec
from hybrimoe_kt.errors import ConfigError

from .trace import ABSENT, Phase, Trace, check, make_steps
from .trace_file import write_trace

ArrayLike = Any
"""Whatever NumPy can read without a copy through the device: lists, arrays, CPU tensors."""


class Recorder:
    """Collects routing of one model; not thread-safe, holds host memory only until `trace()`.

    A step begins whenever the first MoE layer reports again; a step with more than one token is prefill unless
    `begin_step` said otherwise.
    """

    def __init__(self, model: str, specs: Sequence[LayerSpec], *, source: str = "recorded") -> None:
        if not specs:
            raise ConfigError("a recorder needs at least one MoE layer")
        self.model, self.source = model, source
        self.run: Mapping[str, Any] = {}
        """Kept in the trace: how the run was configured and what it counted."""
        self._specs = tuple(specs)
        self._position = {spec.layer: i for i, spec in enumerate(specs)}
        self._request = -1
        self._phase: Phase | None = None
        self._steps: list[_StepRecord] = []

    def begin_request(self) -> None:
        """Mark the next step as the first of a new request."""
        self._request += 1

    def begin_step(self, phase: Phase) -> None:
        """Fix the phase of the next step."""
        self._phase = phase

    def record(
        self,
        layer: int,
        experts: ArrayLike,
        weights: ArrayLike,
        scores: ArrayLike | None = None,
        predicted: ArrayLike | None = None,
        predicted_scores: ArrayLike | None = None,
        token_scores: ArrayLike | None = None,
    ) -> None:
        """Take one layer's routing: `experts`, `weights` `[num_tokens, top_k]`.

        `scores` `[num_tokens, num_experts]` and `predicted_scores` `[depth, num_tokens, num_experts]` are kept averaged
        over the tokens (those who have only the average give one row); `predicted` `[depth, num_tokens, top_k]`;
        `token_scores` `[num_tokens, num_experts]` are kept as they are, in half precision.
        """
        if layer not in self._position:
            raise ConfigError(f"layer {layer} is no MoE layer of this recording; valid: {sorted(self._position)}")
        position = self._position[layer]
        if position == 0 or not self._steps:
            self._open_step(len(np.asarray(experts)))
        step = self._steps[-1]
        step.experts[position] = np.array(experts, dtype=np.int16)
        step.weights[position] = np.array(weights, dtype=np.float32)
        if scores is not None:
            step.scores[position] = np.asarray(scores, dtype=np.float32).mean(axis=0)
        if predicted is not None:
            step.predicted[position] = np.array(predicted, dtype=np.int16)
        if predicted_scores is not None:
            step.predicted_scores[position] = np.asarray(predicted_scores, dtype=np.float32).mean(axis=1)
        if token_scores is not None:
            step.token_scores[position] = np.array(token_scores, dtype=np.float16)

    def _open_step(self, num_tokens: int) -> None:
        phase = self._phase or ("prefill" if num_tokens > 1 else "decode")
        self._phase = None
        self._steps.append(_StepRecord(max(self._request, 0), phase, num_tokens))

    @property
    def num_tokens(self) -> int:
        """Tokens recorded so far, those of an unfinished step included."""
        return sum(step.num_tokens for step in self._steps)

    def drop_unfinished(self) -> int:
        """Forget a last step that not every layer has reported; returns the tokens forgotten."""
        if self._steps and len(self._steps[-1].experts) < len(self._specs):
            return self._steps.pop().num_tokens
        return 0

    def trace(self) -> Trace:
        """Return everything recorded so far; a step that ended early is an error."""
        if not self._steps:
            raise ConfigError("nothing was recorded: no MoE layer reported its routing")
        layers = tuple(spec.layer for spec in self._specs)
        for index, step in enumerate(self._steps):
            missing = [layer for layer, position in self._position.items() if position not in step.experts]
            if missing:
                raise ConfigError(f"recorded step {index} lacks layer {missing[0]}")
        steps = self._steps
        return check(
            Trace(
                model=self.model,
                layers=layers,
                num_experts=self._specs[0].num_experts,
                expert_bytes=tuple(spec.expert_bytes for spec in self._specs),
                steps=make_steps([s.request for s in steps], [s.phase for s in steps], [s.num_tokens for s in steps]),
                experts=np.concatenate([self._rows(step, step.experts, np.int16) for step in steps]),
                weights=np.concatenate([self._rows(step, step.weights, np.float32) for step in steps]),
                scores=self._dense("scores"),
                predicted=self._predicted(),
                predicted_scores=self._dense("predicted_scores"),
                token_scores=self._token_scores(),
                run=self.run,
                source=self.source,
            ),
            "recording",
        )

    def save(self, path: str | Path) -> Path:
        """Write the compact format and return the path written."""
        return write_trace(self.trace(), path)

    def _rows(self, step: _StepRecord, parts: dict[int, npt.NDArray[Any]], kind: Any) -> npt.NDArray[Any]:
        """Stack layers to `[num_tokens, num_layers, top_k]`; a pruned layer holds the step's last tokens."""
        top_k = parts[0].shape[1]
        rows = np.full((step.num_tokens, len(self._specs), top_k), ABSENT if kind is np.int16 else 0, dtype=kind)
        for position, part in parts.items():
            if part.shape[1] != top_k or len(part) > step.num_tokens:
                raise ConfigError(
                    f"layer {self._specs[position].layer} routed {part.shape[0]} tokens to {part.shape[1]} experts"
                    f" each; the first layer of that step {step.num_tokens} to {top_k}"
                )
            if len(part):
                rows[step.num_tokens - len(part) :, position] = part
        return rows

    def _dense(self, name: str) -> npt.NDArray[np.float32] | None:
        """Stack per-step arrays where every step has them; layers without any (the last one's look-ahead) stay 0."""
        found = [part for step in self._steps for part in getattr(step, name).values()]
        if not found or any(not getattr(step, name) for step in self._steps):
            return None
        shape = max((part.shape for part in found), default=())
        stacked = np.zeros((len(self._steps), len(self._specs), *shape), dtype=np.float32)
        for index, step in enumerate(self._steps):
            for position, part in getattr(step, name).items():
                stacked[index, position][tuple(slice(size) for size in part.shape)] = part
        return stacked

    def _predicted(self) -> npt.NDArray[np.int16] | None:
        found = [part for step in self._steps for part in step.predicted.values()]
        if not found:
            return None
        depth, top_k = max(part.shape[0] for part in found), found[0].shape[2]
        rows = []
        for step in self._steps:
            block = np.full((step.num_tokens, len(self._specs), depth, top_k), ABSENT, dtype=np.int16)
            for position, part in step.predicted.items():
                block[step.num_tokens - part.shape[1] :, position, : part.shape[0]] = part.transpose(1, 0, 2)
            rows.append(block)
        return np.concatenate(rows)

    def _token_scores(self) -> npt.NDArray[np.float16] | None:
        """Scores of all tokens where every layer gave them; a pruned layer's other tokens stay 0."""
        if any(len(step.token_scores) < len(self._specs) for step in self._steps):
            return None
        rows = np.zeros((self.num_tokens, len(self._specs), self._specs[0].num_experts), dtype=np.float16)
        end = 0
        for step in self._steps:
            end += step.num_tokens
            for position, part in step.token_scores.items():
                rows[end - len(part) : end, position] = part
        return rows


class _StepRecord:
    def __init__(self, request: int, phase: Phase, num_tokens: int) -> None:
        self.request, self.phase, self.num_tokens = request, phase, num_tokens
        self.experts: dict[int, npt.NDArray[np.int16]] = {}
        self.weights: dict[int, npt.NDArray[np.float32]] = {}
        self.scores: dict[int, npt.NDArray[np.float32]] = {}
        self.predicted: dict[int, npt.NDArray[np.int16]] = {}
        self.predicted_scores: dict[int, npt.NDArray[np.float32]] = {}
        self.token_scores: dict[int, npt.NDArray[np.float16]] = {}
