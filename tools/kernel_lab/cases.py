"""Every configuration of every kernel that can be launched, and what each claims of its machine code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from hybrimoe_kt.expert_form import ExpertForm
from hybrimoe_kt.kernels.between import PLAIN, Between
from hybrimoe_kt.kernels.configs import (
    DecodeConfig,
    PrefillConfig,
    combine_config,
    decode_config,
    mixture_config,
    prefill_configs,
    quantize_config,
    sort_config,
)
from hybrimoe_kt.kernels.targets import Target
from hybrimoe_kt.quants import QuantType, Unit, kernel_types

__all__ = ["Case", "Claims", "Work", "cases_for", "mixtures_for"]

_TYPES = MappingProxyType(
    {
        "memory": "*u8",
        "tables": "*u8",
        "slot_bytes": "i64",
        "slot_of": "*i32",
        "ids": "*i64",
        "weights": "*fp32",
        "pair_slot": "*i32",
        "pairs": "*i32",
        "slots": "*i32",
        "xq": "*i32",
        "xs": "*fp32",
        "xm": "*fp32",
        "answers": "*fp32",
        "out": "*fp32",
        "bias": "*fp32",
    }
)
"""Argument types by name; what is not named here or in a case is int32."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a kernel's main loop must show: 16-byte loads at least, tensor-core or dot-product instructions, and at
    most so many conversions between int and float and, if that is said, so many loads under 16 bytes."""

    wide_loads: int = 0
    max_narrow_loads: int | None = None
    tensor: bool = False
    dot: bool = False
    max_conversions: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What one program does in one step of its main loop: bytes of weights read, tensor-core multiply-adds; and how
    often each of its threads looks code words up, of how many bytes."""

    weight_bytes: float = 0.0
    tensor_macs: int = 0
    look_ups: float = 0.0
    look_up_bytes: int = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel with all its constants, for one target."""

    op: str
    variant: str
    constants: tuple[tuple[str, int | float], ...]
    pointers: tuple[tuple[str, str], ...]
    num_warps: int
    num_stages: int
    claims: Claims
    work: Work

    @property
    def name(self) -> str:
        return f"{self.op}[{self.variant}]"

    def type_of(self, argument: str) -> str:
        return dict(self.pointers).get(argument) or _TYPES.get(argument, "i32")


def cases_for(target: Target) -> list[Case]:
    """Return every case of a target: experts' in a layer's order, linear layers, attention, rows, plans."""
    from .attention_cases import attention_cases  # made of what stands here
    from .linear_cases import linear_cases
    from .plan_cases import plan_cases
    from .row_cases import row_cases

    experts = [*_quantize(target), *_decode(target), *_sort(target), *_prefill(target), *_combine(target)]
    return [*experts, *linear_cases(target), *attention_cases(target), *row_cases(target), *plan_cases(target)]


def mixtures_for(target: Target) -> list[Case]:
    """Return the cases of gate and up in two types, which no file at hand has: too many for the table."""
    config = mixture_config(target)
    pairs = [(gate, up) for gate in kernel_types() for up in kernel_types() if gate is not up]
    decode = [_gate_up(target, gate, up, "fp32") for gate, up in pairs]
    return decode + [_grouped(target, config, gate, up, x) for x in ("fp16", "bf16") for gate, up in pairs]


def _quantize(target: Target) -> Iterator[Case]:
    config = quantize_config(target)
    for kind in ("fp32", "fp16", "bf16"):
        for is_gated in (False, True):
            constants, variant = (("GATED", is_gated), ("BLOCKS", config.blocks)), kind + " gated" * is_gated
            pointers = ("x", f"*{kind}"), ("up", f"*{kind}")
            yield Case("quantize_rows", variant, constants, pointers, config.num_warps, 1, Claims(), Work())


@dataclass(frozen=True, slots=True)
class _Form:
    """Experts of another form than gated SiLU: whose, what kernels are told, and in which types files have them."""

    whose: str
    between: Between
    types: tuple[str, ...]


_FORMS = (
    _Form("gpt-oss", Between(ExpertForm(alpha=1.702, limit=7.0, up_offset=1.0, has_biases=True)), ("MXFP4", "Q8_0")),
    _Form("gemma4", Between(ExpertForm("gelu_tanh")), ("Q4_0", "Q4_K")),
    _Form("nemotron", Between(ExpertForm("relu2", is_gated=False)), ("Q4_K", "Q8_0")),
    _Form("deepseek4", Between(ExpertForm(limit=10.0)), ("MXFP4",)),
)


def _typed_forms() -> list[tuple[_Form, QuantType]]:
    named = {row.name: row for row in kernel_types()}
    return [(form, named[name]) for form in _FORMS for name in form.types]


def _decode(target: Target) -> Iterator[Case]:
    for kind in kernel_types():
        yield _gate_up(target, kind, kind, "fp32")
        for x in ("fp16", "bf16") if kind.is_float else ():
            yield _gate_up(target, kind, kind, x)
    for kind in kernel_types():
        yield _down(target, kind)
    for form, kind in _typed_forms():
        yield _gate_up(target, kind, kind, "fp32", form)
        if form.between.form.has_biases:
            yield _down(target, kind, form)


def _gate_up(target: Target, gate: QuantType, up: QuantType, x: str, form: _Form | None = None) -> Case:
    config, between = decode_config(target), form.between if form else PLAIN
    constants = (("GATE", gate.number), ("UP", up.number), *between.constants.items(), ("FORM", config.form))
    shape = (("ROWS", config.rows), ("UNITS", config.units))
    # two types have a loop each; either may be the one that is looked at
    together = 2 if gate is up and between.form.is_gated else 1
    wide = min(
        together * _unit(form).loads + (0 if form.is_float and x != "fp32" else _unit(form).x_loads)
        for form in (gate, up)
    )
    claims = Claims(
        wide,
        _narrow(gate, together) if gate is up else None,
        dot=not (gate.is_float or up.is_float),
        max_conversions=together * max(_conversions(gate), _conversions(up)),
    )
    variant = _variant(gate, up, form) if x == "fp32" else f"{_variant(gate, up, form)} {x}"
    pointers = (("x", f"*{x}"), ("act", "*fp32"))
    work = _unit_work(config, up, together) if gate is up else Work()
    return Case("decode_gate_up", variant, constants + shape, pointers, config.num_warps, 3, claims, work)


def _variant(gate: QuantType, up: QuantType, form: _Form | None = None) -> str:
    types = gate.name if gate is up else f"{gate.name}+{up.name}"
    return f"{types} of {form.whose}" if form else types


def _down(target: Target, kind: QuantType, form: _Form | None = None) -> Case:
    config = decode_config(target)
    constants = (("DOWN", kind.number), ("FORM", config.form), ("ROWS", config.rows), ("UNITS", config.units))
    claims = Claims(
        _unit(kind).loads + _unit(kind).x_loads,
        _narrow(kind, 1),
        dot=not kind.is_float,
        max_conversions=_conversions(kind),
    )
    work = _unit_work(config, kind, 1)
    constants += (("CLEARS", True), ("BIASED", form is not None))
    return Case(
        "decode_down", _variant(kind, kind, form), constants, (("x", "*fp32"),), config.num_warps, 3, claims, work
    )


def _unit(form: QuantType) -> Unit:
    assert form.unit, f"no kernel reads {form.name}"
    return form.unit


def _conversions(form: QuantType) -> int:
    """Integer sums that a unit turns into floats: one for each scale in it."""
    return 0 if form.is_float else 2 if form.block_values == 256 else 1


def _narrow(form: QuantType, num_matrices: int) -> int | None:
    """Where weights are looked up, nothing is loaded in small pieces but code words, their fields and a scale of x."""
    unit = _unit(form)
    return num_matrices * (unit.look_ups + unit.fields) + 1 if unit.look_ups else None


def _unit_work(config: DecodeConfig, form: QuantType, num_matrices: int) -> Work:
    unit = _unit(form)
    values = config.rows * config.units * unit.values * num_matrices
    return Work(values * form.bytes_per_value, 0, unit.look_ups * num_matrices, unit.look_up_bytes)


def _prefill(target: Target) -> Iterator[Case]:
    for config in prefill_configs(target):
        for x in ("fp16", "bf16"):
            for kind in kernel_types():
                yield _grouped(target, config, kind, kind, x)
            for kind in kernel_types():
                yield _grouped_down(target, config, kind, x)
            for form, kind in _typed_forms():
                yield _grouped(target, config, kind, kind, x, form)
                if form.between.form.has_biases:
                    yield _grouped_down(target, config, kind, x, form)


_LIMITS = MappingProxyType({"fp16": 65504.0, "bf16": math.ldexp(255, 120)})


def _grouped(
    target: Target, config: PrefillConfig, gate: QuantType, up: QuantType, x: str, form: _Form | None = None
) -> Case:
    between = form.between if form else PLAIN
    types = (("GATE", gate.number), ("UP", up.number), *between.constants.items(), ("FORM", config.form))
    constants = (*types, ("ROWS", config.rows), ("PAIRS", config.pairs))
    variant = f"{_variant(gate, up, form)} {x} x{config.pairs}"
    return Case(
        "prefill_gate_up",
        variant,
        (*constants, ("LARGEST", _LIMITS[x])),
        (("x", f"*{x}"), ("act", f"*{x}")),
        config.num_warps,
        config.num_stages,
        _step_claims(target, config, gate, up),
        _step_work(target, config, up, 1 + between.form.is_gated) if gate is up else Work(),
    )


def _grouped_down(target: Target, config: PrefillConfig, kind: QuantType, x: str, form: _Form | None = None) -> Case:
    types = (("DOWN", kind.number), ("BIASED", form is not None), ("FORM", config.form))
    return Case(
        "prefill_down",
        f"{_variant(kind, kind, form)} {x} x{config.pairs}",
        (*types, ("ROWS", config.rows), ("PAIRS", config.pairs)),
        (("act", f"*{x}"),),
        config.num_warps,
        config.num_stages,
        _step_claims(target, config, kind),
        _step_work(target, config, kind, 1),
    )


def _step_claims(target: Target, config: PrefillConfig, *forms: QuantType) -> Claims:
    """Quants come 16 bytes at a time; where there are code words, activations do if they are enough for all threads."""
    activations = 32 * config.pairs // (config.num_warps * target.warp_size)  # of 2 bytes, in either of the two tiles
    return Claims(wide_loads=int(activations >= 8 or not any(_unit(form).look_ups for form in forms)), tensor=True)


def _step_work(target: Target, config: PrefillConfig, form: QuantType, num_matrices: int) -> Work:
    unit, values = _unit(form), config.rows * 64 * num_matrices
    look_ups = values / unit.values * unit.look_ups / (config.num_warps * target.warp_size)
    return Work(values * form.bytes_per_value, values * config.pairs, look_ups, unit.look_up_bytes)


def _sort(target: Target) -> Iterator[Case]:
    config = sort_config(target)
    for block in sorted({shape.pairs for shape in prefill_configs(target)}):
        constants = (("BLOCK", block), ("EXPERTS", 128), ("CHUNK", config.chunk))
        yield Case("sort_pairs", f"128 experts x{block}", constants, (), config.num_warps, 1, Claims(), Work())


def _combine(target: Target) -> Iterator[Case]:
    config = combine_config(target)
    constants = (("TOKENS", config.tokens), ("COLUMNS", config.columns))
    yield Case("combine_pairs", "fp32", constants, (), config.num_warps, 3, Claims(wide_loads=1), Work())
