"""The one door to the legacy framework: ktransformers 0.2.x, its base classes and settings."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator

import torch

from hybrimoe_kt.backends.cpu_cpuinfer import adopt_pool
from hybrimoe_kt.errors import ConfigError, HostCompatibilityError

try:
    from ktransformers.operators.base_operator import BaseInjectedModule
    from ktransformers.operators.experts import KExpertsBase, KExpertsCPU
    from ktransformers.server.config.config import Config
except ImportError as error:
    try:
        _found = f"ktransformers {importlib.metadata.version('ktransformers')}"
    except importlib.metadata.PackageNotFoundError:
        _found = "no ktransformers"
    raise HostCompatibilityError(
        f"hybrimoe_kt.host.kt needs the legacy framework, ktransformers 0.2.1 to 0.3.2, and found {_found} ({error}); "
        f"with current versions use the `ktransformers` command of hybrimoe-kt"
    ) from None

__all__ = ["BaseInjectedModule", "KExpertsBase", "expert_threads", "float32_default", "refuse_capture"]


def expert_threads() -> int:
    """Threads that compute in the framework's pool, which our CPU experts share; it counts one that only hands out."""
    told = int(Config().cpu_infer)
    if told < 2:
        raise ConfigError(f"--cpu_infer {told}: the framework's pool computes with one thread less; give 2 or more")
    adopt_pool(KExpertsCPU.CPU_INFER)
    return told - 1


@contextlib.contextmanager
def float32_default() -> Iterator[None]:
    """Undo for our code that the framework makes the model's type torch's default, which new tensors follow."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def refuse_capture(operator: str) -> None:
    """Raise HostCompatibilityError while a CUDA graph is captured: a replayed graph would repeat one step's plan."""
    if torch.cuda.is_current_stream_capturing():
        raise HostCompatibilityError(
            f"{operator} decides in every step where each expert is computed, which a captured CUDA graph cannot; "
            f"start with --use_cuda_graph False"
        )
