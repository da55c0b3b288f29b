"""Every configuration of the linear layers' kernels, and what each claims of its machine code."""

from __future__ import annotations

from collections.abc import Iterator

from hybrimoe_kt.kernels.configs import FewConfig, few_configs, many_configs, shares_weights
from hybrimoe_kt.kernels.targets import Target
from hybrimoe_kt.quants import TYPES, QuantType, kernel_types

from .cases import Case, Claims, Work, _conversions, _step_claims, _step_work, _unit

__all__ = ["linear_cases"]

_TWO, _THREE = (12, 14), (8, 12, 14)
"""Types of linear layers that share their input: a sample, every mixture would be hundreds."""


def linear_cases(target: Target) -> list[Case]:
    """Return every case of a target, linear_few's first."""
    return [*_few(target), *_many(target)]


def _few(target: Target) -> Iterator[Case]:
    for config in few_configs(target):
        forms = [form for form in kernel_types() if config.tokens == 1 or shares_weights([form.number])]
        for form in forms:
            for x in ("fp32", "fp16", "bf16") if form.is_float else ("fp32",):
                yield _few_case(target, config, (form,), x)
    for config in few_configs(target)[-2:]:
        for numbers in (_TWO, _THREE) if config.tokens == 1 else (_TWO,):
            yield _few_case(target, config, tuple(TYPES[number] for number in numbers), "fp32")


def _few_case(target: Target, config: FewConfig, forms: tuple[QuantType, ...], x: str) -> Case:
    rows = config.rows * config.units // (config.num_warps * target.warp_size)  # of a thread
    numbers = [form.number for form in forms] + [-1] * (3 - len(forms))
    constants = tuple(zip(("FIRST", "SECOND", "THIRD"), numbers, strict=True))
    shape = (("FORM", config.form), ("ROWS", config.rows), ("UNITS", config.units), ("TOKENS", config.tokens))
    claims = Claims(  # each type has a loop; any may be the one that is looked at
        min(
            rows * _unit(form).loads + (0 if form.is_float and x != "fp32" else config.tokens * _unit(form).x_loads)
            for form in forms
        ),
        dot=not any(form.is_float for form in forms),
        max_conversions=rows * config.tokens * max(_conversions(form) for form in forms),
    )
    names = "+".join(form.name for form in forms)
    variant = f"{names}{'' if x == 'fp32' else f' {x}'} {config.rows}x{config.units} x{config.tokens}"
    pointers = (("x", f"*{x}"), ("out", f"*{x}"))
    unit = _unit(forms[0])
    weight_bytes = config.rows * config.units * unit.values * forms[0].bytes_per_value
    work = Work(weight_bytes, 0, unit.look_ups * rows, unit.look_up_bytes) if len(forms) == 1 else Work()
    return Case("linear_few", variant, constants + shape, pointers, config.num_warps, 3, claims, work)


def _many(target: Target) -> Iterator[Case]:
    for config in many_configs(target):
        for x in ("fp16", "bf16"):
            for form in kernel_types():
                yield Case(
                    "linear_many",
                    f"{form.name} {x} x{config.pairs}",
                    (("KIND", form.number), ("FORM", config.form), ("ROWS", config.rows), ("TOKENS", config.pairs)),
                    (("x", f"*{x}"), ("out", f"*{x}")),
                    config.num_warps,
                    config.num_stages,
                    _step_claims(target, config, form),
                    _step_work(target, config, form, 1),
                )
