"""Step 4: a whole model, generated on the spot: right or not, then every method at every cache size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hybrimoe_kt.errors import CapacityError, summary

from .plan import Plan
from .results import Results

__all__ = ["configurations", "run"]

METHODS: dict[str, dict[str, Any]] = {
    "hybrid": {"scheduler": "balanced", "prefetch_size": 2},
    "hybrid, no prefetch": {"scheduler": "balanced", "prefetch_size": 0},
    "hybrid, planned on the device": {"scheduler": "balanced", "prefetch_size": 2, "planner": "device"},
    "static": {"scheduler": "static", "prefetch_size": 0},
    "gpu_only": {"scheduler": "gpu_only", "prefetch_size": 0},
    "cpu_only": {"scheduler": "cpu_only", "prefetch_size": 0},
}
EAGER = "hybrid, eager"
ALL_RESIDENT = "hybrid", EAGER, "gpu_only"
"""Methods worth measuring where all experts are in slots; the others are the same then, or leave them unused."""
CHECKED_TOKENS = 1, 8, 64
RIGHT = 0.03
"""Most relative error of a right answer: activations are rounded to 8 bits twice, 1 to 2 %."""
_LONG_PROMPT_SHARE = 0.15
"""Of the time left, that a long prompt may take."""


def configurations() -> list[tuple[str, str]]:
    """Cache size and method, most telling first: what time runs out for is at the end."""
    first = [("all", name) for name in ALL_RESIDENT]
    middle = [("50%", name) for name in METHODS]
    middle.insert(1, ("50%", EAGER))
    return [first[0], *middle, *first[1:], *((cache, name) for cache in ("25%", "75%") for name in METHODS)]


def run(plan: Plan, results: Results, ends_s: float, model: str) -> None:
    """All rows of one model."""
    from hybrimoe_kt.device.emulated.immediate import host_available_bytes
    from hybrimoe_kt.device.inspect_machine import inspect_memory

    from .generate import write_model
    from .shapes import choose

    step = f"model:{model}"
    limit = inspect_memory()["container_limit_bytes"]
    chosen = choose(plan, model, min(host_available_bytes(), limit or 2**62), ends_s - time.monotonic())
    if isinstance(chosen, str):
        results.leave_out(step, "model", model, chosen)
        return
    results.note_step(step, file=str(chosen.path), model=model)
    began = time.perf_counter()
    pools = {True: 1 << 18, False: 1 << 16} if plan.is_emulated else None
    num_bytes = write_model(chosen.shape, chosen.path, pools)
    values = {"GB": num_bytes / 1e9, "generated_s": time.perf_counter() - began, "layers": chosen.shape.layers}
    results.add(step, "model", model, values, note=chosen.note)
    _measure(plan, results, ends_s, step, chosen.path)


def _measure(plan: Plan, results: Results, ends_s: float, step: str, file: Path) -> None:
    from .measured import Measured

    options = {"accelerator": plan.accelerator, "fallback": False, "cache_size": "50%", "profile": "default"}
    options |= METHODS["hybrid"]
    if plan.is_emulated:
        options |= {"cpu_backend": "torch_reference", "gpu_backend": "torch_reference"}
    machine = Measured(file, plan, options)
    results.add(
        step, "model", "loaded", {"load_s": machine.load_s}, health=machine.health, note=machine.runtime.describe()
    )
    _check(results, step, machine)
    if not plan.is_emulated:
        _calibrate(results, step, machine)
    costs: list[float] = []
    for cache, method in configurations():
        name = f"{cache}, {method}"
        left = ends_s - time.monotonic()
        if left < (max(costs) if costs else 3.0):
            results.leave_out(step, "methods", name, "out of time: give more --minutes, or fewer --models")
            continue
        began = time.monotonic()
        _row(results, step, machine, cache, method, left)
        costs.append(time.monotonic() - began)


def _check(results: Results, step: str, machine: Any) -> None:
    """Answers of three layers beside float32, everything on the card and mixed, everything unwritten NaN."""
    for name, changes in (("hybrid, 50%", None), ("all on the GPU", {"cache_size": "all"} | METHODS["gpu_only"])):
        try:
            if changes is not None:
                machine.restart(changes, poison=True)
            for num_tokens in CHECKED_TOKENS:
                errors = machine.errors(num_tokens)
                worst = max(errors.values())
                is_right = all(error <= RIGHT for error in errors.values())  # NaN is not
                values = {f"layer {layer}": error for layer, error in errors.items()}
                title = f"{name}, {num_tokens} token{'s' * (num_tokens > 1)}"
                if is_right:
                    results.add(step, "right", title, values | {"worst": worst}, health=machine.health)
                else:
                    results.fail(step, "right", title, f"wrong by {errors}, at most {RIGHT} is rounding")
        except CapacityError as error:
            results.leave_out(step, "right", name, f"does not fit: {error}")
        except Exception as error:
            results.fail(step, "right", name, summary(error))


def _calibrate(results: Results, step: str, machine: Any) -> None:
    """Plans of all rows are made with this machine's numbers, measured now: pages are there, kernels compiled."""
    began = time.perf_counter()
    try:
        machine.restart({})
        verdict = machine.calibrate(results.folder)
    except Exception as error:
        results.fail(step, "model", "calibrated", f"{summary(error)}; plans are made with the default profile")
    else:
        results.add(step, "model", "calibrated", {"load_s": time.perf_counter() - began}, note=verdict)


def _row(results: Results, step: str, machine: Any, cache: str, method: str, left_s: float) -> None:
    name, notes = f"{cache}, {method}", []
    try:
        is_eager = method == EAGER
        machine.restart({"cache_size": cache} | METHODS["hybrid" if is_eager else method], eager=is_eager)
        values: dict[str, Any] = machine.decode() | machine.overlap() | machine.prediction()
        short, long = machine.sizes.prompts
        machine.prefill_s(short)  # compiles, and fills caches of every kind
        seconds = machine.prefill_s(short)
        values[f"prefill_{short}"] = short / seconds
        expected = seconds * long / short
        if expected < _LONG_PROMPT_SHARE * left_s:
            values[f"prefill_{long}"] = long / machine.prefill_s(long)
        else:
            notes.append(f"{long} tokens would take {expected:.0f} s, left out")
    except CapacityError as error:
        results.leave_out(step, "methods", name, f"does not fit: {error}")
    except Exception as error:
        results.fail(step, "methods", name, summary(error))
    else:
        results.add(step, "methods", name, values, health=machine.health, note="; ".join(notes))
