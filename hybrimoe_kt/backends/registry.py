"""Every expert backend by name. A class of one's own is named by its place: "package.module:Class".

What a backend must be is `device.backend`; nothing of any is imported before it is asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hybrimoe_kt.dotted import is_dotted, load_dotted
from hybrimoe_kt.errors import ConfigError, summary, unknown_name

if TYPE_CHECKING:
    import torch

    from hybrimoe_kt.device.backend import CpuBackend, GpuBackend

__all__ = [
    "CPU_BACKENDS",
    "DEFAULT_CPU",
    "DEFAULT_GPU",
    "FALLBACK_GPU",
    "GPU_BACKENDS",
    "REFERENCE",
    "check_cpu",
    "check_gpu",
    "cpu_backend",
    "default_gpu",
    "gpu_backend",
    "gpu_class",
    "make_gpu",
]

logger = logging.getLogger(__name__)

CPU_BACKENDS: dict[str, str] = {
    "auto": "hybrimoe_kt.backends.cpu_auto:AutoBackend",
    "ggml": "hybrimoe_kt.backends.cpu_ggml:GgmlBackend",
    "llamafile": "hybrimoe_kt.backends.cpu_llamafile:LlamafileBackend",
    "cpuinfer": "hybrimoe_kt.backends.cpu_cpuinfer:CpuInferBackend",
    "torch_reference": "hybrimoe_kt.backends.torch_reference:TorchReferenceCpu",
}
GPU_BACKENDS: dict[str, str] = {
    "triton": "hybrimoe_kt.backends.gpu_triton:TritonGpu",
    "torch": "hybrimoe_kt.backends.gpu_torch:TorchGpu",
    "torch_reference": "hybrimoe_kt.backends.gpu_torch:TorchReferenceGpu",
}
DEFAULT_CPU, DEFAULT_GPU = "auto", "triton"
FALLBACK_GPU = "torch"
"""Where the default cannot run: any type, several times slower."""
REFERENCE = "torch_reference"
"""Of both kinds: any type, exact, slow; what an emulated accelerator computes with."""


def check_cpu(name: str) -> None:
    """ConfigError for what is no CPU backend's name or place. Only one named by its place is imported."""
    if name not in CPU_BACKENDS:
        cpu_backend(name)


def check_gpu(name: str) -> None:
    """The same of a GPU backend; auto is one."""
    if name not in ("auto", *GPU_BACKENDS):
        gpu_backend(name)


def cpu_backend(name: str) -> type[CpuBackend]:
    """Return the class, to be made with (num_threads, max_tokens)."""
    from hybrimoe_kt.device.backend import CpuBackend

    found: type[CpuBackend] = _load("cpu_backend", name, CPU_BACKENDS, CpuBackend)
    return found


def gpu_backend(name: str) -> type[GpuBackend]:
    """Return the class, to be made without arguments."""
    from hybrimoe_kt.device.backend import GpuBackend

    found: type[GpuBackend] = _load("gpu_backend", name, GPU_BACKENDS, GpuBackend)
    return found


def make_gpu(name: str, device: torch.device) -> GpuBackend:
    """Make what computes experts on `device`; "auto" is the default, on an emulated accelerator the reference."""
    if name == "auto":
        return gpu_backend(REFERENCE)() if device.type == "cpu" else default_gpu(device)
    kind = gpu_backend(name)
    reason = kind.unusable(device)
    if reason is not None:
        raise ConfigError(f"gpu_backend is {name!r}, but {reason}; or give auto")
    return kind()


def gpu_class(name: str, device: torch.device) -> type[GpuBackend]:
    """Return what `make_gpu` makes one of, without a word about what cannot run."""
    if name != "auto":
        return gpu_backend(name)
    kind = gpu_backend(DEFAULT_GPU)
    if device.type == "cpu":
        return gpu_backend(REFERENCE)
    return kind if kind.unusable(device) is None else gpu_backend(FALLBACK_GPU)


def default_gpu(device: torch.device) -> GpuBackend:
    """Make the default backend, or with a warning, once a reason, the fallback where it cannot run."""
    kind = gpu_backend(DEFAULT_GPU)
    reason = kind.unusable(device)
    if reason is None:
        return kind()
    _warn_once(reason)
    return gpu_backend(FALLBACK_GPU)()


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("GPU experts are dequantised and multiplied by torch, several times slower: %s", reason)


def _load(option: str, name: str, known: Mapping[str, str], protocol: type) -> Any:
    if name in known:
        return load_dotted(known[name])
    if not is_dotted(name):
        raise ConfigError(unknown_name(option, name, known if option == "cpu_backend" else ("auto", *known)))
    try:
        found = load_dotted(name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{option} {name!r} cannot be loaded: {summary(error)}") from error
    members = {*vars(protocol), *protocol.__annotations__}
    lacking = [member for member in sorted(members) if not member.startswith("_") and not hasattr(found, member)]
    lacking += sorted(getattr(found, "__abstractmethods__", ()))
    if lacking:
        raise ConfigError(
            f"{option} {name!r} is no {protocol.__name__}, it has no {', '.join(lacking)}: let it inherit from "
            f"{protocol.__module__}.{protocol.__name__}"
        )
    return found
