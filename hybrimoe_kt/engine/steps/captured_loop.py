"""Steps of one token on an accelerator: everything stays where it is, so that a step can be captured and replayed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.engine.memory.growing_cache import GrowingCache
from hybrimoe_kt.host.hf.fixed_steps import attention_of, layers_read_as_kept, refusal, sums_may_wait
from hybrimoe_kt.host.hf.loading import LoadedModel

from .captured_steps import CapturedSteps

__all__ = ["CapturedLoop", "captured_loop"]

logger = logging.getLogger(__name__)


def captured_loop(loaded: LoadedModel, cache: GrowingCache, *, captures: bool | None) -> CapturedLoop | None:
    """Make what computes single tokens of a model that stands on one accelerator; None where that is not so.

    `captures`: whether steps are captured and replayed; None: where that is quicker, which it is on real accelerators.
    """
    model: Any = loaded.model
    accelerator = _accelerator_of(loaded, model.device)
    is_real = accelerator is not None and accelerator.device.type != "cpu"
    is_planned = loaded.runtime.device_planner is not None
    if captures is None and is_planned:
        captures = True
    if accelerator is None or not (is_real or captures) or accelerator.capture() is None:
        return None
    reason = refusal(model, is_divided=loaded.crossings is not None) or cache.refuses_fixed_steps()
    if reason is not None:
        logger.log(logging.WARNING if captures else logging.INFO, "steps are not captured: %s", reason)
        return None
    return CapturedLoop(loaded, accelerator, captures=captures is not False)


def _accelerator_of(loaded: LoadedModel, device: torch.device) -> Accelerator | None:
    """The accelerator on whose stream the model runs."""
    for accelerator in loaded.runtime.accelerators:
        if accelerator.device == device:
            return accelerator
    return ImmediateAccelerator() if device.type == "cpu" else choose_accelerator(str(device))


class CapturedLoop:
    """Asks Transformers' modules for one token's step, once; what they enqueued is replayed for every later token.

    It is captured anew when the cache has moved, to have room, after one step that is not, or when what a layer's
    experts do has changed.
    """

    def __init__(self, loaded: LoadedModel, accelerator: Accelerator, *, captures: bool) -> None:
        """Without `captures` the modules are asked every time."""
        self._loaded, self._accelerator = loaded, accelerator
        self.captured = CapturedSteps(loaded, accelerator, captures=captures)
        model: Any = loaded.model
        self._model, self._embedding = model, model.get_input_embeddings()
        self._attention = attention_of(model)
        self._read_as_kept = layers_read_as_kept(model)
        device = model.device
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._length = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.empty(0, dtype=torch.int64, device=device)
        """0, 1, 2, ... as far as there has been room."""
        self._given: dict[str, torch.Tensor] = {}
        self._logits = torch.empty(0)

    @property
    def accelerator(self) -> Accelerator:
        """On whose stream the model runs."""
        return self._accelerator

    @property
    def captures(self) -> bool:
        """Whether steps are captured; else the modules are asked every time."""
        return self.captured.captures

    @captures.setter
    def captures(self, captures: bool) -> None:
        self.captured.captures = captures

    @property
    def num_captures(self) -> int:
        """Since the model was loaded."""
        return self.captured.num_captures

    def takes(self, tokens: int, length: int) -> bool:
        """Whether a step is for it: one token, of a conversation of `length` with it, that is not its first."""
        return tokens == 1 < length

    @torch.inference_mode()
    def step(self, ids: Sequence[int], cache: GrowingCache) -> torch.Tensor:
        """Append one token to `cache`; its logits, float32 `[vocab]` on the CPU, valid until the next step.

        CaptureError where the step cannot be captured after all; what the cache holds is in doubt then.
        """
        with self._accelerator.model_stream():
            num_added = 0
            try:
                cache.fix(self._position, self._length, self._read_as_kept)
                self._place(ids[0], cache)
                self.captured.compute((cache.number, cache.num_moves), lambda: self._ask(cache))
                num_added = 1
            finally:
                cache.unfix(num_added)
            return self._logits[0, -1].float().cpu()

    def forget(self) -> None:
        """Let go of what was captured, and its memory."""
        self.captured.forget()
        self._logits = torch.empty(0)

    def _place(self, token: int, cache: GrowingCache) -> None:
        """Write what differs from token to token, where a captured step reads it."""
        position = cache.get_seq_length()
        self._position.fill_(position)
        self._length.fill_(position + 1)
        for attention in self._attention:
            attention.plan(position + 1)
        room = cache.room
        if len(self._places) < room:
            self._places = torch.arange(room, device=self._position.device)
        if getattr(self._embedding, "reads_on_host", False):
            embedded = self._embedding(torch.tensor([[token]], device="cpu"))
            self._given.setdefault("inputs_embeds", torch.empty_like(embedded)).copy_(embedded)
        else:
            ids = self._given.setdefault("input_ids", torch.zeros(1, 1, dtype=torch.int64, device=self._model.device))
            ids.fill_(token)

    def _ask(self, cache: GrowingCache) -> None:
        """Have the modules enqueue the step."""
        with sums_may_wait():
            output = self._model(
                **self._given,
                **{self._loaded.cache_name: cache},
                attention_mask=self._mask(cache),
                position_ids=self._position[None],
                use_cache=True,
                logits_to_keep=1,
            )
        self._logits = output.logits

    def _mask(self, cache: GrowingCache) -> torch.Tensor:
        """What of the room is seen, bool `[1, 1, 1, room]`, for attention that is given all of it."""
        return (self._places[: cache.room] <= self._position)[None, None, None]
