"""`PendingSum`: hidden states that the norm behind them adds up, in its own launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils._pytree import tree_map

from hybrimoe_kt.backends.row_kernels import ROW_KERNELS, is_used

__all__ = ["PendingSum", "pending", "sums_may_wait"]

_ADDITIONS: tuple[Any, ...] = (torch.add, torch.Tensor.add, torch.Tensor.__add__)
_OPERATORS = (
    *("radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "pow", "neg", "abs", "matmul"),
    *("iadd", "isub", "imul", "itruediv", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len"),
)
_may_wait: ContextVar[bool] = ContextVar("sums may wait", default=False)


@contextlib.contextmanager
def sums_may_wait() -> Iterator[None]:
    """Let modules hand out sums that are pending: their caller gives what they answer to nobody but other modules."""
    before = _may_wait.set(True)
    try:
        yield
    finally:
        _may_wait.reset(before)


class PendingSum:
    """The sum of two or three tensors `[..., width]` of one shape and dtype, the last two first, until it is known.

    What is added to it is added later, too; to whatever else is asked of it, it answers as the tensor that it then
    becomes, with the bits of torch's additions.
    """

    def __init__(self, *terms: torch.Tensor) -> None:
        """One is a sum that is known."""
        self.terms = terms

    @property
    def total(self) -> torch.Tensor:
        """The sum, added up by torch if nobody has done so."""
        *more, total = self.terms
        for term in reversed(more):
            total = term + total
        self.settle(total)
        return total

    def settle(self, total: torch.Tensor) -> None:
        """Take note of the sum."""
        self.terms = (total,)

    @property
    def shape(self) -> torch.Size:
        return self.terms[0].shape

    def __getattr__(self, name: str) -> Any:
        if name == "terms" or name.startswith("__"):  # not there yet, or Python asking what can be done with it
            raise AttributeError(name)
        return getattr(self.total, name)

    __hash__ = object.__hash__

    def __add__(self, other: Any) -> Any:
        return _added(self, other)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _ADDITIONS and len(args) == 2 and not kwargs:
            return _added(*args)
        return function(*tree_map(_known, args), **tree_map(_known, dict(kwargs or {})))


def _operator(name: str) -> Callable[..., Any]:
    return lambda pending, *others: getattr(pending.total, name)(*map(_known, others))


for _name in _OPERATORS:
    setattr(PendingSum, f"__{_name}__", _operator(f"__{_name}__"))


def pending(*terms: torch.Tensor, kernel: str) -> Any:
    """The terms' sum, the last two first: pending where it may be and norms are kernels under that name, else known."""
    made = PendingSum(*terms)
    may_wait = _may_wait.get() and kernel in ROW_KERNELS and is_used(kernel, terms[0].device)
    return made if may_wait else made.total


def _known(value: Any) -> Any:
    return value.total if isinstance(value, PendingSum) else value


def _added(first: Any, second: Any) -> Any:
    later = second.terms if isinstance(second, PendingSum) else (second,)
    if len(later) > 2:
        later = (second.total,)
    terms = _known(first), *later
    is_plain = all(isinstance(term, torch.Tensor) for term in terms)
    if is_plain and len({(term.shape, term.dtype, term.device) for term in terms}) == 1:
        return PendingSum(*terms)
    return terms[0] + _known(second)
