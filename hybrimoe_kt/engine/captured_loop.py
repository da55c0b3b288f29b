"""Steps of one token on an accelerator: everything stays where it is, so that a step can be captured and replayed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.step_graph import CaptureError
from hybrimoe_kt.device.unused_memory import is_out_of_memory
from hybrimoe_kt.errors import first_line
from hybrimoe_kt.host.hf.fixed_steps import attention_of, experts_of, layers_read_as_kept, refusal, sums_may_wait
from hybrimoe_kt.host.hf.loading import LoadedModel
from hybrimoe_kt.runtime.step_pieces import StepPieces

from .growing_cache import GrowingCache

__all__ = ["CapturedLoop", "captured_loop"]

logger = logging.getLogger(__name__)


def captured_loop(loaded: LoadedModel, cache: GrowingCache, *, captures: bool | None) -> CapturedLoop | None:
    """Make what computes single tokens of a model that stands on one accelerator; None where that is not so.

    `captures`: whether steps are captured and replayed; None: where that is quicker, which it is on real accelerators.
    """
    model: Any = loaded.model
    accelerator = _accelerator_of(loaded, model.device)
    is_real = accelerator is not None and accelerator.device.type != "cpu"
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
        self._loaded, self._accelerator, self.captures = loaded, accelerator, captures
        model: Any = loaded.model
        self._model, self._embedding = model, model.get_input_embeddings()
        self._experts, self._attention = experts_of(model), attention_of(model)
        self._read_as_kept = layers_read_as_kept(model)
        device = model.device
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._length = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.empty(0, dtype=torch.int64, device=device)
        """0, 1, 2, ... as far as there has been room."""
        self._given: dict[str, torch.Tensor] = {}
        self._logits = torch.empty(0)
        self._serves_experts = accelerator in loaded.runtime.accelerators
        self._pieces: StepPieces | None = None
        self._warm_for: tuple[int, int] | None = None
        self._captured_for: tuple[int, int] | None = None
        """The cache, and how often it had moved, when a step was last asked of the modules, and captured."""
        self.num_captures = 0

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
                self._compute(cache)
                num_added = 1
            finally:
                cache.unfix(num_added)
            return self._logits[0, -1].float().cpu()

    def forget(self) -> None:
        """Let go of what was captured, and its memory."""
        self._pieces, self._warm_for, self._captured_for = None, None, None
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

    def _compute(self, cache: GrowingCache) -> None:
        runtime, now = self._loaded.runtime, (cache.number, cache.num_moves)
        if not self.captures or (self._serves_experts and self._accelerator not in runtime.accelerators):
            self._ask(cache)  # as well where it has been given up: what was enqueued may never end
            return
        pieces = self._pieces
        if pieces is None or not pieces.serves(runtime):
            pieces = self._pieces = StepPieces(runtime, self._accelerator)
            self._captured_for = None
        if self._captured_for == now and pieces.is_valid():
            pieces.replay()
            return
        self._captured_for = None
        self._stand_in(pieces)
        try:
            if self._warm_for != now or not pieces.can_capture:  # rooms of a new size may want kernels, or plans
                self._ask(cache)
                self._warm_for = now
                return
            pieces.begin_capture()
            try:
                self._ask(cache)
                pieces.end_capture()
            except BaseException as error:
                pieces.abort()
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):  # as a driver refuses it
                    raise CaptureError(first_line(error)) from error
                raise
        finally:
            self._stand_in(None)
        self._captured_for, self.num_captures = now, self.num_captures + 1

    def _stand_in(self, pieces: StepPieces | None) -> None:
        for experts in self._experts:
            experts.attach(self._loaded.runtime if pieces is None else pieces)

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
