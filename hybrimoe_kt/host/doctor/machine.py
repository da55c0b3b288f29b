"""The machine and what of this package can run on it, as data ready for JSON."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

from hybrimoe_kt import __version__
from hybrimoe_kt.backends.registry import DEFAULT_CPU, DEFAULT_GPU, cpu_backend, gpu_backend
from hybrimoe_kt.device.cores import default_expert_threads
from hybrimoe_kt.device.inspect_machine import (
    attempt,
    inspect_accelerators,
    inspect_cpu,
    inspect_library,
    inspect_memory,
)

__all__ = ["report_machine"]

_CPU = ("model", "machine", "features", "features_from", "physical_cores", "logical_cores", "numa_nodes")
_MEMORY = (
    "total_bytes", "available_bytes", "container_limit_bytes", "page_lock_limit_bytes", "page_lock_unlimited"
)  # fmt: skip
_LIBRARIES = (
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("gguf", "gguf"),
    ("kt-kernel", "kt_kernel"),
    ("triton", "triton"),
    ("flashinfer-python", "flashinfer"),
)


def report_machine() -> dict[str, Any]:
    """Gather everything; takes as long as importing torch and kt-kernel. Never raises for what is missing."""
    accelerators = attempt(inspect_accelerators, torch_built_for=None, nvidia_driver=False, devices=[])
    return {
        "hybrimoe_kt": __version__,
        "python": platform.python_version(),
        "cpu": attempt(inspect_cpu, **dict.fromkeys(_CPU)),
        "memory": attempt(inspect_memory, **dict.fromkeys(_MEMORY)),
        "accelerators": accelerators,
        "libraries": {distribution: inspect_library(distribution, module) for distribution, module in _LIBRARIES},
        "cpu_kernels": attempt(_cpu_kernels, runs=False, types=[]),
        "gpu_kernels": attempt(lambda: _gpu_kernels(accelerators["devices"]), runs=False, types=[], device=None),
        "profile": attempt(_profile, machine=None, path=None, measured=False, date=None),
        "last_runs": _last_runs(),
    }


def _cpu_kernels() -> dict[str, Any]:
    """Whether the default CPU backend imports; its threads are not started."""
    backend = cpu_backend(DEFAULT_CPU)
    reason = backend.unusable()
    return {"runs": reason is None, "types": [kind.name for kind in backend.types()], "problem": reason}


def _gpu_kernels(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the default GPU backend runs on the first device; without one, why it does not on the CPU."""
    import torch

    device = devices[0]["name"] if devices else "cpu"
    backend = gpu_backend(DEFAULT_GPU)
    reason = backend.unusable(torch.device(device))
    types = [kind.name for kind in backend.types()]
    return {"runs": reason is None, "types": types, "device": device, "problem": reason}


def _last_runs() -> dict[str, Any]:
    """Accelerators whose last run was not clean, by name; none where this cannot be told."""
    try:
        from hybrimoe_kt.host.last_runs import read_last_runs
    except (ImportError, OSError):  # it needs torch, whose absence is told elsewhere
        return {}
    return read_last_runs()


def _profile() -> dict[str, Any]:
    """This machine's calibration with the default accelerator, backend and number of threads, as a run looks it up."""
    from hybrimoe_kt.device.calibrate import machine_name, profile_path
    from hybrimoe_kt.device.choose import choose_accelerator
    from hybrimoe_kt.profiles import load_profile

    cpu: Any = SimpleNamespace(name=DEFAULT_CPU, num_threads=default_expert_threads())
    machine = machine_name(choose_accelerator("auto"), cpu)
    path = profile_path(machine)
    found = {"machine": machine, "path": str(path), "measured": path.is_file()}
    if not found["measured"]:
        return found
    return attempt(lambda: found | {"date": load_profile(path).date}, **found, date=None)
