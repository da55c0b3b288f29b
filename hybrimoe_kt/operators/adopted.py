"""Operators that are the stock module, with another way to compute: of its class, and with everything it has."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Adopted"]


class Adopted(nn.Module):
    """Takes a stock module's class besides its own, so that whoever asks for that class, or its attributes, finds it.

    `super().forward` of an operator is the stock one.
    """

    stock_class: type[nn.Module]

    def __init__(self, stock: nn.Module) -> None:
        """`stock` is no longer to be used: its parameters and modules are this one's."""
        super().__init__()
        vars(self).update(vars(stock))
        self.__class__ = _joined(type(self), type(stock))

    def stock_copy(self, **changes: Any) -> nn.Module:
        """The stock module as it would be with other attributes; shares all that is not changed."""
        made = self.stock_class.__new__(self.stock_class)
        vars(made).update(vars(self) | changes)
        return made


_known: dict[tuple[type[Adopted], type[nn.Module]], type[Adopted]] = {}


def _joined(operator: type[Adopted], stock: type[nn.Module]) -> type[Adopted]:
    if (operator, stock) not in _known:
        _known[operator, stock] = type(f"Fused{stock.__name__}", (operator, stock), {"stock_class": stock})
    return _known[operator, stock]
