"""Steps whose work is enqueued by a model's own modules once, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable

from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.step_graph import CaptureError
from hybrimoe_kt.device.unused_memory import is_out_of_memory
from hybrimoe_kt.errors import first_line
from hybrimoe_kt.host.hf.fixed_steps import experts_of
from hybrimoe_kt.host.hf.loading import LoadedModel
from hybrimoe_kt.runtime.step_pieces import StepPieces

__all__ = ["CapturedSteps"]


class CapturedSteps:
    """Has modules enqueue a step, and what they enqueued replayed, for as long as that is worth something."""

    def __init__(self, loaded: LoadedModel, accelerator: Accelerator, *, captures: bool) -> None:
        """Without `captures` the modules are asked every time."""
        self._loaded, self.accelerator, self.captures = loaded, accelerator, captures
        self._experts = experts_of(loaded.model)
        self._serves_experts = accelerator in loaded.runtime.accelerators
        self.pieces: StepPieces | None = None
        self._warm_for: tuple[int, int] | None = None
        self._captured_for: tuple[int, int] | None = None
        """The memory, and how often it had moved, when a step was last asked of the modules, and captured."""
        self.num_captures = 0

    def forget(self) -> None:
        """Let go of what was captured, and its memory."""
        self.pieces, self._warm_for, self._captured_for = None, None, None

    def compute(self, now: tuple[int, int], ask: Callable[[], None]) -> None:
        """Compute a step that reads and writes the memory `now` names, by replay or by what `ask` has enqueued.

        CaptureError where the step cannot be captured after all; what it has written is in doubt then.
        """
        runtime = self._loaded.runtime
        if not self.captures or (self._serves_experts and self.accelerator not in runtime.accelerators):
            ask()  # as well where it has been given up: what was enqueued may never end
            return
        pieces = self.pieces
        if pieces is None or not pieces.serves(runtime):
            pieces = self.pieces = StepPieces(runtime, self.accelerator)
            self._captured_for = None
        if self._captured_for == now and pieces.is_valid():
            pieces.replay()
            return
        self._captured_for = None
        self._stand_in(pieces)
        try:
            if self._warm_for != now or not pieces.can_capture:  # rooms of a new size may want kernels, or plans
                ask()
                pieces.end_planned()
                self._warm_for = now
                return
            pieces.begin_capture()
            try:
                ask()
                pieces.end_capture()
                pieces.end_planned()
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
