"""Captures a step on a CPU: its aten calls are written down, and replayed on the same tensors without its Python.

No faster than the step itself, on the contrary. What it is for is proof: a length, a position or a mask that Python
worked out while the step was captured is a constant afterwards, and the tokens come out wrong, as they would on a GPU.
It does not see `tolist` and `numpy`, which a CPU answers without an operation, nor memory given back, as it holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .step_graph import CaptureError, StepGraph, listeners

__all__ = ["Recorder"]

_MAKE_MEMORY = frozenset({"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
                          "aten::new_empty_strided"})  # fmt: skip
"""What these return holds nothing yet, so that a replay has nothing to do."""
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Of what makes the host wait for a device, for a value or their number: that ends the capture of a graph there."""


class _Call:
    """One operation and the tensors that its answers go to."""

    __slots__ = ("args", "function", "kwargs", "outputs")

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: list[torch.Tensor],
    ) -> None:
        self.function, self.args, self.kwargs, self.outputs = function, args, kwargs, outputs

    def __call__(self) -> None:
        answer = self.function(*self.args, **self.kwargs)
        if self.outputs:
            for output, fresh in zip(self.outputs, _tensors(answer), strict=True):
                output.copy_(fresh)


class _Piece:
    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self.calls = calls

    @torch.inference_mode()
    def replay(self) -> None:
        for call in self.calls:
            call()


class Recorder(TorchDispatchMode):
    """See `step_graph.StepCapture`. What it records has been done, as on a stream that is not being captured."""

    host_sees_writes = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Callable[[], object]] | None = None

    def begin(self) -> None:
        assert self._calls is None, "one piece at a time"
        self._calls = []
        listeners.append(self)
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> StepGraph:
        calls = self._calls
        assert calls is not None, "nothing was begun"
        self.abort()
        return _Piece(calls)

    def abort(self) -> None:
        if self._calls is not None:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            assert listeners.pop() is self, "whoever began last ends first"
            self._calls = None

    def note(self, work: Callable[[], object]) -> None:
        """Do one unit of work and write it down; what it calls is not."""
        assert self._calls is not None, "asked while recording"
        with _disable_current_modes():
            work()
        self._calls.append(work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        name = func._schema.name
        if _is_read_by_host(func, args):
            raise CaptureError(f"the step reads a value on the host ({name}), which no captured step can")
        answer = func(*args, **given)
        if name in _MAKE_MEMORY or self._calls is None:
            return answer
        if func._schema.is_mutable:
            self._calls.append(_Call(func, args, given, []))
            return answer
        held = {_storage(tensor) for tensor in _tensors((args, given))}
        outputs = list(_tensors(answer))
        if all(_storage(output) in held for output in outputs):
            return answer  # a view; or nothing
        self._calls.append(_Call(func, args, given, outputs))
        return answer


def _is_read_by_host(func: Any, args: tuple[Any, ...]) -> bool:
    if not _READS.intersection(func.tags):
        return False
    is_lookup = func._schema.name == "aten::index"  # by places it has as many answers as these, by a mask who knows
    return not is_lookup or any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in tuples, lists and dictionaries, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
