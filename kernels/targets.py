"""The GPUs that kernels are built for, and what of them decides a launch shape or bounds a speed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["INTERPRETER", "TARGETS", "Target", "of_capability"]

_PLAIN, _DP4A, _DOT4, _SUDOT4 = range(4)  # blocks.dot has these as constants of compiled code


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture, and one product of it that speaks for its speed.

    `shared_bytes` is what a program may use, `registers` what a thread may. Clock, cores and bandwidth are the
    product's published ones. Per core and clock: `issue_lanes` threads get an instruction of any kind,
    `integer_lanes` one of integer arithmetic, `slow_lanes` a conversion between int and float; `tensor_macs` are
    16-bit multiply-adds of the tensor cores with float32 accumulation.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    registers: int
    dot_form: int
    product: str
    num_cores: int
    clock_hz: float
    dram_bytes_per_s: float
    tensor_macs: int
    issue_lanes: int = 128
    integer_lanes: int = 64
    slow_lanes: int = 16
    interpreted: bool = False

    @property
    def dram_bytes_per_core_clock(self) -> float:
        """DRAM's share of one core in one clock, bytes."""
        return self.dram_bytes_per_s / (self.num_cores * self.clock_hz)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, 255, _DP4A, "A100 40 GB", 108, 1.41e9, 1555e9, 1024),
        Target("sm_86", "cuda", 86, 32, 99 << 10, 255, _DP4A, "RTX A6000", 84, 1.80e9, 768e9, 512),
        Target("sm_89", "cuda", 89, 32, 99 << 10, 255, _DP4A, "RTX 4090", 128, 2.52e9, 1008e9, 256),
        Target("sm_90", "cuda", 90, 32, 227 << 10, 255, _DP4A, "H100 SXM", 132, 1.83e9, 3350e9, 2048),
        Target("sm_100", "cuda", 100, 32, 227 << 10, 255, _DP4A, "B200", 148, 1.85e9, 8000e9, 4096),
        Target("sm_120", "cuda", 120, 32, 99 << 10, 255, _DP4A, "RTX 5090", 170, 2.41e9, 1792e9, 256),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, 512, _DOT4, "MI300X", 304, 2.10e9, 5300e9, 1024, 64, 64),
        Target("gfx1100", "hip", "gfx1100", 32, 64 << 10, 256, _SUDOT4, "RX 7900 XTX", 96, 2.50e9, 960e9, 256, 64, 64),
    )
}

INTERPRETER = Target("interpreter", "cpu", 0, 32, 1 << 30, 255, _PLAIN, "none", 1, 1.0, 1.0, 1, interpreted=True)
"""Triton's interpreter: kernels on CPU tensors, slow, for tests. Few fat programs, and no instruction of any GPU."""


def of_capability(backend: str, arch: int | str) -> Target:
    """Return the target built for a device's architecture: its own, or else the closest older one of the family."""
    if backend == "hip":
        name = str(arch).partition(":")[0]
        return TARGETS.get(name, TARGETS["gfx942" if name.startswith("gfx9") else "gfx1100"])
    older = [target for target in TARGETS.values() if target.backend == "cuda" and int(target.arch) <= int(arch)]
    return older[-1] if older else TARGETS["sm_80"]
