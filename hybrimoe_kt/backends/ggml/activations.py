"""What joins an expert's gate and up, as ggml's operations, each in the place of what it was made of."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from hybrimoe_kt.expert_form import ExpertForm

from .library import Context, data_of

__all__ = ["Chain", "join", "refused_form"]

_GATED = {"silu": "swiglu_split", "gelu": "geglu_erf_split", "gelu_tanh": "geglu_split"}
_ALONE = {"silu": ("silu",), "gelu": ("gelu_erf",), "gelu_tanh": ("gelu",), "relu2": ("relu", "sqr")}


class Chain:
    """Tensors of one shape, each made of the one before it, in one place."""

    def __init__(self, context: Context) -> None:
        self.last = 0
        self._context = context
        self._places: list[ctypes.c_void_p] = []

    def then(self, operation: str, *arguments: Any, is_first: bool = False) -> Chain:
        """Add `ggml_<operation>` of the last tensor and `arguments`; the first takes its arguments alone."""
        function = getattr(self._context.library, f"ggml_{operation}")
        self.last = function(self._context.pointer, *arguments if is_first else (self.last, *arguments))
        self._places.append(data_of(self.last))
        return self

    def place(self, address: int) -> None:
        """Say where its values are."""
        for field in self._places:
            field.value = address


def refused_form(form: ExpertForm) -> str | None:
    """Why there are no operations for experts of that form, None where there are."""
    if form.activation not in (_GATED if form.is_gated else _ALONE) or (form.alpha != 1 and not form.is_clamped_swiglu):
        return f"experts of the form {form.describe()}, for which ggml has no operation"
    return None


def join(form: ExpertForm, gate: Chain, up: Chain) -> None:
    """Go on from the products of gate and up, in `gate`; of experts without a gate that is the product of up."""
    if not form.is_gated:
        for operation in _ALONE[form.activation]:
            gate.then(operation)
    elif form.is_clamped_swiglu:
        gate.then("swiglu_oai", up.last, form.alpha, form.limit)
    else:
        if form.limit is not None:
            gate.then("clamp", -math.inf, form.gate_limit)
            up.then("clamp", -form.limit, form.limit)
        if form.up_offset:
            up.then("scale_bias", 1.0, form.up_offset)
        gate.then(_GATED[form.activation], up.last)
