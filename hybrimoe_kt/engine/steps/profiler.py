"""Where a token's time goes: experts, attention, our own overhead, and the rest of the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from hybrimoe_kt.runtime import Runtime
from hybrimoe_kt.runtime.seconds import Seconds

__all__ = ["TimeShares"]


class TimeShares:
    """Times decode steps (one token each) on the host's clock; prompts are not counted.

    `experts` is the time computing or waiting for experts; `overhead` is ours: reading the routing, planning,
    bookkeeping, prefetch decisions. On an accelerator, attention is what its launches took, not its kernels; where all
    of a layer but its experts is one graph, it is that graph. `replay` is what enqueuing captured pieces took, the
    model's own work, attention included.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, dense_seconds: Callable[[], float] = lambda: 0.0) -> None:
        """`dense_seconds`: spent in graphs so far."""
        self._runtime, self._dense_seconds = runtime, dense_seconds
        self._attention_s = self._began = self._dense_before_s = 0.0
        self._totals = dict.fromkeys(("experts", "attention", "replay", "overhead", "other"), 0.0)
        self.num_tokens = 0
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self._began = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._attention_s += time.perf_counter() - self._began

    def step(self, num_tokens: int, seconds: float) -> None:
        """Account for one forward pass that took `seconds`; resets the runtime's own clock."""
        ours: Seconds = self._runtime.seconds
        dense_s = self._dense_seconds()
        self._attention_s += dense_s - self._dense_before_s
        self._dense_before_s = dense_s
        if num_tokens == 1:
            shares = {
                "experts": ours.submit_and_gpu + ours.wait,
                "attention": self._attention_s,
                "replay": ours.replay,
                "overhead": ours.read + ours.plan + ours.prefetch,
            }
            shares["other"] = seconds - sum(shares.values())
            for name, value in shares.items():
                self._totals[name] += value
            self.num_tokens += 1
        ours.reset()
        self._attention_s = 0.0

    def per_token_ms(self) -> dict[str, float]:
        """Milliseconds per decoded token by share, and `total`."""
        count = max(1, self.num_tokens)
        shares = {name: value / count * 1e3 for name, value in self._totals.items()}
        return shares | {"total": sum(shares.values())}
