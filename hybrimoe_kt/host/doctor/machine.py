"""The machine and what of this package can run on it, as data ready for JSON."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from hybrimoe_kt import __version__
from hybrimoe_kt.backends.registry import DEFAULT_CPU, DEFAULT_GPU, REFERENCE, cpu_backend, gpu_backend
from hybrimoe_kt.device.inspect_machine import (
    attempt,
    inspect_accelerators,
    inspect_cpu,
    inspect_library,
    inspect_memory,
)

__all__ = ["report_machine"]

_CPU = ("model", "machine", "features", "features_from", "physical_cores", "logical_cores", "numa_nodes")
_KT_PYTHONS = ("3.11.", "3.12.")
"""For which kt-kernel 0.7.2 has builds."""
_MEMORY = (
    "total_bytes", "available_bytes", "container_limit_bytes", "page_lock_limit_bytes", "page_lock_unlimited"
)  # fmt: skip
_LIBRARIES = (
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("gguf", "gguf"),
    ("libggml-python", "libggml"),
    ("kt-kernel", "kt_kernel"),
    ("triton", "triton"),
    ("flashinfer-python", "flashinfer"),
)


def report_machine() -> dict[str, Any]:
    """Gather everything; takes as long as importing torch and kt-kernel. Never raises for what is missing."""
    accelerators = attempt(inspect_accelerators, torch_built_for=None, nvidia_driver=False, devices=[])
    profile = attempt(_profile, machine=None, path=None, measured=False, date=None, cpu_backends={})
    return {
        "hybrimoe_kt": __version__,
        "python": platform.python_version(),
        "cpu": attempt(inspect_cpu, **dict.fromkeys(_CPU)),
        "memory": attempt(inspect_memory, **dict.fromkeys(_MEMORY)),
        "accelerators": accelerators,
        "libraries": {distribution: inspect_library(distribution, module) for distribution, module in _LIBRARIES},
        "cpu_kernels": _cpu_kernels(profile),
        "gpu_kernels": attempt(lambda: _gpu_kernels(accelerators["devices"]), runs=False, types=[], device=None),
        "attention": attempt(lambda: _attention(accelerators["devices"]), devices=[]),
        "profile": profile,
        "last_runs": _last_runs(),
    }


def _cpu_kernels(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Which libraries compute on the CPU, and which the default backend takes of them; no threads are started."""
    ggml = attempt(_ggml, runs=False, types=[], version=None, file=None, instructions=[])
    kt_kernel = {"has_build": _has_kt_kernel_build()} | attempt(lambda: _runs("llamafile"), runs=False, types=[])
    libraries = {"ggml": ggml, "kt-kernel": kt_kernel}
    types = dict.fromkeys(kind for found in libraries.values() for kind in found["types"])
    problems = dict.fromkeys(found["problem"] for found in libraries.values() if found["problem"])
    runs = ggml["runs"] or kt_kernel["runs"]
    return {
        "runs": runs,
        "types": list(types),
        **libraries,
        "keeps_dense_packed": ggml["runs"],
        "auto": attempt(lambda: _chosen(libraries, profile), takes=None, measured=False, reason=None),
        "problem": None if runs else "; ".join(problems),
    }


def _has_kt_kernel_build() -> bool:
    """Whether kt-kernel can be installed for this machine and Python."""
    is_x86 = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    return is_x86 and platform.python_version().startswith(_KT_PYTHONS)


def _ggml() -> dict[str, Any]:
    from hybrimoe_kt.backends.ggml.library import library

    found = _runs("ggml")
    if not found["runs"]:
        return found
    ggml = library()
    return found | {"version": ggml.version, "file": ggml.file, "instructions": list(ggml.instructions)}


def _runs(name: str) -> dict[str, Any]:
    """Whether a CPU backend can be used, and what it computes."""
    backend = cpu_backend(name)
    reason = backend.unusable()
    types = [kind.name for kind in backend.types()] if reason is None else []
    return {"runs": reason is None, "types": types, "problem": reason}


def _chosen(libraries: Mapping[str, Mapping[str, Any]], profile: Mapping[str, Any]) -> dict[str, Any]:
    """Who computes experts that every library here reads where they are, and why."""
    from hybrimoe_kt.backends.cpu_auto import CANDIDATES, chosen, in_words

    usable = [name for name in CANDIDATES if libraries["ggml" if name == "ggml" else "kt-kernel"]["runs"]]
    if not usable:
        return {"takes": REFERENCE, "measured": False, "reason": "neither library runs"}
    measured = len(profile["cpu_backends"].keys() & set(usable)) > 1
    takes = in_words(chosen(profile["cpu_backends"], usable))
    if measured:
        reason = f"as measured on {profile['date']}"
    elif not libraries["kt-kernel"]["runs"]:
        reason = "kt-kernel does not run here"
    elif not libraries["ggml"]["runs"]:
        reason = "ggml does not run here"
    else:
        reason = "not compared with kt-kernel yet, which hybrimoe calibrate does"
    return {"takes": takes, "measured": measured, "reason": reason}


def _gpu_kernels(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the default GPU backend runs on the first device; without one, why it does not on the CPU."""
    import torch

    device = devices[0]["name"] if devices else "cpu"
    backend = gpu_backend(DEFAULT_GPU)
    reason = backend.unusable(torch.device(device))
    types = [kind.name for kind in backend.types()]
    return {"runs": reason is None, "types": types, "device": device, "problem": reason}


def _attention(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Who would attend in a captured step, on each device, and why nobody better; nothing is tried."""
    import torch

    from hybrimoe_kt.backends.decode_attention import survey

    found = []
    for name in [device["name"] for device in devices] or ["cpu"]:
        reasons = survey(torch.device(name))
        takes = next(kind for kind, reason in reasons.items() if reason is None)
        better = list(reasons)[: list(reasons).index(takes)]
        found.append({"device": name, "takes": takes, "better": {kind: reasons[kind] for kind in better}})
    return {"devices": found}


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

    accelerator = choose_accelerator("auto")
    threads = cpu_backend(DEFAULT_CPU).default_threads(beside_accelerator=accelerator is not None)
    cpu: Any = SimpleNamespace(name=DEFAULT_CPU, num_threads=threads)
    machine = machine_name(accelerator, cpu)
    path = profile_path(machine)
    found = {"machine": machine, "path": str(path), "measured": path.is_file(), "date": None, "cpu_backends": {}}
    if not found["measured"]:
        return found

    def read() -> dict[str, Any]:
        profile = load_profile(path)
        return {"date": profile.date, "cpu_backends": profile.cpu_backends}

    return found | attempt(read)
