"""What a step enqueues, captured once and replayed: device work without the Python that asked for it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["opaque"]


def opaque(work: Callable[[], object]) -> None:
    """Do `work`, which launches kernels that torch's dispatcher does not see, or reads on a CPU what a kernel would.

    It is one unit to whoever records a step: called again at every replay, with whatever the tensors it was made with
    hold by then. It returns nothing, keeps their shapes and places, and decides nothing else.
    """
    work()
