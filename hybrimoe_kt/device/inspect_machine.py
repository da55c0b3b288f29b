"""What this machine is: processor, memory, accelerators, libraries. Returns plain data, ready for JSON.

Every section has all its keys whatever is missing, None where nothing could be learnt, and `problem`: one sentence
on why, or None. torch is imported only by `inspect_accelerators`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from hybrimoe_kt.errors import summary

from .cores import physical_cores

__all__ = ["attempt", "inspect_accelerators", "inspect_cpu", "inspect_library", "inspect_memory"]

_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8")
"""What CPU kernels for experts can make use of, by its name in /proc/cpuinfo."""
_CPUFEATURE_NAMES = {
    "AVX2": "avx2", "FMA3": "fma", "AVX512f": "avx512f", "AVX512bw": "avx512bw", "AVX512vnni": "avx512_vnni"
}  # fmt: skip
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def attempt(probe: Callable[[], Mapping[str, Any]], **unknown: Any) -> dict[str, Any]:
    """Run a probe; whatever it raises becomes its `problem`, beside the values of `unknown`."""
    try:
        return unknown | {"problem": None} | dict(probe())
    except Exception as error:  # a broken library may raise anything, and the report must go on
        return unknown | {"problem": summary(error)}


def inspect_cpu() -> dict[str, Any]:
    """Processor, features that experts' kernels use, cores this process may run on, NUMA nodes."""
    lines = _read("/proc/cpuinfo").splitlines()
    values = dict(reversed([_key_value(line) for line in lines if ":" in line]))  # of the first processor
    features = set(values.get("flags", values.get("Features", "")).split())
    source = "/proc/cpuinfo"
    try:
        import cpufeature

        found = cpufeature.CPUFeature
        features |= {name for theirs, name in _CPUFEATURE_NAMES.items() if found.get(theirs)}
        source = f"cpufeature, {source}" if lines else "cpufeature"
    except Exception:  # not installed, or built for another processor
        pass
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return {
        "model": values.get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "features": [name for name in _FEATURES if name in features],
        "features_from": source if lines or source != "/proc/cpuinfo" else None,
        "physical_cores": physical_cores(),
        "logical_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "numa_nodes": len(nodes) or None,
    }


def inspect_memory() -> dict[str, Any]:
    """Host memory in bytes; `page_lock_limit_bytes` None and `page_lock_unlimited` true is `ulimit -l unlimited`."""
    try:
        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    except OSError:  # a Linux without /proc
        total, available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    limits = (_read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    group = [int(text) for text in limits if text.strip().isdigit() and int(text) < total]
    locked, unlimited = _page_lock_limit()
    return {
        "total_bytes": total,
        "available_bytes": available,
        "container_limit_bytes": min(group, default=None),
        "page_lock_limit_bytes": locked,
        "page_lock_unlimited": unlimited,
    }


def _page_lock_limit() -> tuple[int | None, bool]:
    try:
        import resource
    except ImportError:  # Windows
        return None, False
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return (None, True) if soft == resource.RLIM_INFINITY else (soft, False)


def inspect_accelerators() -> dict[str, Any]:
    """What torch was built for and every CUDA, HIP or XPU device it sees. Raises what importing torch raises."""
    import torch

    version = torch.version
    built = f"CUDA {version.cuda}" if version.cuda else f"ROCm {version.hip}" if version.hip else None
    xpu = getattr(torch, "xpu", None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kinds = [module for module in (torch.cuda, xpu) if module is not None and module.is_available()]
        devices = [_device(module, index) for module in kinds for index in range(module.device_count())]
    return {
        "torch_built_for": built or ("XPU" if getattr(version, "xpu", None) else "CPU"),
        "nvidia_driver": _NVIDIA_DRIVER.exists(),
        "devices": devices,
        "problem": str(said[0].message).strip().splitlines()[0] if said and not devices else None,
    }


def _device(module: Any, index: int) -> dict[str, Any]:
    """One device of torch.cuda or torch.xpu; `architecture` is HIP's ("gfx1100"), `compute_capability` CUDA's."""

    def probe() -> dict[str, Any]:
        found: dict[str, Any] = {"model": str(module.get_device_name(index))}
        properties = module.get_device_properties(index)
        found["memory_total_bytes"] = int(properties.total_memory)
        found["architecture"] = getattr(properties, "gcnArchName", None) if _is_hip() else None
        if kind == "cuda" and not _is_hip():
            found["compute_capability"] = "{}.{}".format(*module.get_device_capability(index))
        found["memory_free_bytes"], found["memory_total_bytes"] = map(int, module.mem_get_info(index))
        return found

    kind = module.__name__.rpartition(".")[2]
    keys = ("model", "memory_free_bytes", "memory_total_bytes", "compute_capability", "architecture")
    return {"name": f"{kind}:{index}"} | attempt(probe, **dict.fromkeys(keys))


def _is_hip() -> bool:
    import torch

    return torch.version.hip is not None


def inspect_library(distribution: str, module: str) -> dict[str, Any]:
    """Version of a library, None if it is not installed, and which one this package asks for. Imports nothing."""
    wanted = _wanted(distribution)
    version = None
    if is_installed(module):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
    problem = None
    if version is None:
        problem = "not installed"
    elif wanted is not None and not _fits(version, wanted):
        problem = f"this package wants {wanted}"
    return {"version": version, "wanted": wanted, "problem": problem}


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; does not import it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # half removed, or replaced by something without a spec
        return False


def _wanted(distribution: str) -> str | None:
    """Return "==0.19.0" as this package's own metadata has it; None where it has nothing."""
    try:
        requirements = importlib.metadata.requires("hybrimoe-kt") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None
    for requirement in requirements:
        match = re.match(rf"{re.escape(distribution)}\s*([=<>!~][^;]*)", requirement)
        if match:
            return match[1].strip()
    return None


def _fits(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(wanted).contains(version, prereleases=True)
    except (ImportError, ValueError):
        return True  # not judged


def _key_value(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
