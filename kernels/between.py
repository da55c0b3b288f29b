"""What the kernels of experts are told of their form: constants, and where biases stand in a slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hybrimoe_kt.expert_form import ACTIVATIONS, SWIGLU, ExpertForm

__all__ = ["PLAIN", "Between"]


@dataclass(frozen=True, slots=True)
class Between:
    """`biases` are first bytes of the float32 biases of gate and up in a slot, of down `down_bias`; 0 without any."""

    form: ExpertForm = SWIGLU
    biases: tuple[int, int] = (0, 0)
    down_bias: int = 0
    constants: dict[str, Any] = field(init=False)
    """Of the kernels that join gate and up, by name."""

    def __post_init__(self) -> None:
        form = self.form
        constants = {
            "GATED": form.is_gated,
            "BIASED": form.has_biases,
            "ACTIVATION": ACTIVATIONS.index(form.activation),
            "ALPHA": form.alpha,
            "LIMIT": form.limit or 0.0,
            "GATE_LIMIT": form.gate_limit or 0.0,
            "OFFSET": form.up_offset,
        }
        object.__setattr__(self, "constants", constants)


PLAIN = Between()
