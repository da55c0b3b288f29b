"""Predicted seconds on CPU, GPU and link for the experts of one layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from math import fsum

from hybrimoe_kt.errors import ConfigError

from .profile import Profile

BITS_PER_WEIGHT = 4.5
"""Assumed where a caller knows an expert's bytes but not its arithmetic: Q4_K's 144 bytes per 256 weights."""


class _PerLoad(dict[int, float]):
    """Seconds by load or number of tokens, computed on first use: planning then costs one dictionary look-up."""

    __slots__ = ("_formula",)

    def __init__(self, formula: Callable[[int], float]) -> None:
        super().__init__()
        self._formula = formula

    def __missing__(self, load: int) -> float:
        value = self._formula(load)
        self[load] = value
        return value


class CostModel:
    """Seconds for one layer's experts; `cpu_expert_s` and `gpu_expert_s` map a load -> seconds of one expert.

    The time of a set of experts on the CPU is `cpu_call_s` once plus the sum over the experts, stretched by
    `cpu_slowdown` while the link is busy. `shared_s` and `between_layers_s` map a number of tokens -> seconds: what
    the shared experts take before the first routed expert may use the GPU, and what lies between two MoE layers
    (attention, norms, router), the link's idle time that prefetching may fill; `dense_s` is that at one token.
    `step_overhead_s` is added to every plan's makespan: host time that no assignment changes.
    """

    __slots__ = (
        "between_layers_s",
        "cpu_call_s",
        "cpu_expert_s",
        "cpu_slowdown",
        "dense_s",
        "dense_token_s",
        "expert_bytes",
        "expert_transfer_s",
        "gpu_expert_s",
        "has_gpu",
        "link_bytes_per_s",
        "link_latency_s",
        "shared_s",
        "step_overhead_s",
    )

    def __init__(
        self,
        *,
        cpu: Callable[[int], float],
        gpu: Callable[[int], float] | None = None,
        cpu_call_s: float = 0.0,
        cpu_slowdown: float = 1.0,
        link_latency_s: float = 0.0,
        link_bytes_per_s: float = float("inf"),
        expert_bytes: int = 0,
        shared_expert_s: float = 0.0,
        shared_token_s: float = 0.0,
        dense_s: float = 0.0,
        dense_token_s: float = 0.0,
        step_overhead_s: float = 0.0,
    ) -> None:
        """`cpu` and `gpu` give the seconds of one expert at a load; no `gpu` means a machine without one."""
        self.has_gpu = gpu is not None
        self.cpu_expert_s = _PerLoad(cpu)
        self.gpu_expert_s = _PerLoad(gpu if gpu is not None else _no_gpu)
        self.cpu_call_s = cpu_call_s
        self.cpu_slowdown = cpu_slowdown
        self.link_latency_s = link_latency_s
        self.link_bytes_per_s = link_bytes_per_s
        self.expert_bytes = expert_bytes
        self.expert_transfer_s = self.transfer_s(expert_bytes)
        self.shared_s = _PerLoad(lambda num_tokens: max(shared_expert_s, shared_token_s * num_tokens))
        self.dense_token_s = dense_token_s
        self.step_overhead_s = step_overhead_s
        self._set_dense(dense_s)

    @classmethod
    def from_profile(
        cls,
        profile: Profile,
        *,
        expert_bytes: int,
        expert_macs: int | None = None,
        shared_bytes: int = 0,
        shared_macs: int | None = None,
        dense_bytes: int = 0,
        dense_macs: int | None = None,
    ) -> CostModel:
        """Scale `profile` to a layer whose expert holds `expert_bytes` and does `expert_macs` per token.

        `shared_*` describe the layer's shared experts together, `dense_*` what runs between two MoE layers
        (attention, norms, router). Multiply-accumulates left out follow from the bytes at 4.5 bits a weight.
        """
        if expert_bytes <= 0:
            raise ConfigError(f"expert_bytes is {expert_bytes}; it must be > 0")
        macs = _macs(expert_bytes, expert_macs)
        cpu = _cpu_formula(profile, expert_bytes, macs)
        gpu = _gpu_formula(profile, expert_bytes, macs) if profile.has_gpu else None
        shared_s, shared_token_s = _dense_seconds(profile, shared_bytes, _macs(shared_bytes, shared_macs))
        dense_s, dense_token_s = _dense_seconds(profile, dense_bytes, _macs(dense_bytes, dense_macs))
        overhead_s = profile.gpu_layer_s if profile.gpu_layer_s is not None else profile.cpu_layer_s
        return cls(
            cpu=cpu,
            gpu=gpu,
            cpu_call_s=profile.cpu_call_s,
            cpu_slowdown=profile.cpu_slowdown_while_link_busy,
            link_latency_s=profile.link_latency_s or 0.0,
            link_bytes_per_s=profile.link_bytes_per_s or float("inf"),
            expert_bytes=expert_bytes,
            shared_expert_s=shared_s,
            shared_token_s=shared_token_s,
            dense_s=dense_s + overhead_s,
            dense_token_s=dense_token_s,
            step_overhead_s=profile.step_overhead_s,
        )

    def at_pace(self, cpu: float, dense: float = 1.0, more_overhead_s: float = 0.0) -> CostModel:
        """Return this model with the CPU's experts taking `cpu` times as long, and one token between layers `dense`.

        `more_overhead_s` comes on top of what every step takes; with less than none it takes nothing.
        """
        paced = copy.copy(self)
        paced.step_overhead_s = max(0.0, self.step_overhead_s + more_overhead_s)
        paced._set_dense(dense * self.dense_s)
        formula = self.cpu_expert_s
        paced.cpu_expert_s = _PerLoad(lambda load: cpu * formula[load])
        paced.cpu_call_s = cpu * self.cpu_call_s
        return paced

    def cpu_s(self, loads: Iterable[int]) -> float:
        """Return the seconds of one CPU call that computes experts with these loads, the link being idle."""
        table = self.cpu_expert_s
        work_s = fsum([table[load] for load in loads])  # sum() rounds differently from Python 3.12 on
        return work_s + self.cpu_call_s if work_s else 0.0

    def cpu_end_s(self, work_s: float, link_end_s: float) -> float:
        """Return when CPU work of `work_s` idle-link seconds ends if the link is busy until `link_end_s`."""
        if self.cpu_slowdown == 1.0 or work_s * self.cpu_slowdown <= link_end_s:
            return work_s * self.cpu_slowdown
        return work_s + link_end_s * (1.0 - 1.0 / self.cpu_slowdown) if link_end_s > 0 else work_s

    def gpu_s(self, load: int) -> float:
        """Return the seconds of one expert on the GPU."""
        return self.gpu_expert_s[load]

    def transfer_s(self, num_bytes: int) -> float:
        """Return the seconds one transfer of `num_bytes` holds the link."""
        return self.link_latency_s + num_bytes / self.link_bytes_per_s

    def _set_dense(self, dense_s: float) -> None:
        self.dense_s, token_s = dense_s, self.dense_token_s
        self.between_layers_s = _PerLoad(lambda num_tokens: max(dense_s, token_s * num_tokens))


def _no_gpu(load: int) -> float:
    return float("inf")


def _macs(num_bytes: int, macs: int | None) -> float:
    return float(macs) if macs is not None else num_bytes * 8 / BITS_PER_WEIGHT


def _cpu_formula(profile: Profile, num_bytes: int, macs: float) -> Callable[[int], float]:
    single_s = profile.cpu_expert_s + num_bytes / profile.cpu_single_bytes_per_s
    once_s = profile.cpu_expert_s + num_bytes / profile.cpu_bytes_per_s
    token_s = macs / profile.cpu_macs_per_s

    def seconds(load: int) -> float:
        return single_s if load == 1 else once_s + token_s * load

    return seconds


def _gpu_formula(profile: Profile, num_bytes: int, macs: float) -> Callable[[int], float]:
    assert profile.gpu_call_s is not None, "a profile with a GPU has every gpu_ number"
    assert profile.gpu_bytes_per_s is not None, "a profile with a GPU has every gpu_ number"
    assert profile.gpu_macs_per_s is not None, "a profile with a GPU has every gpu_ number"
    call_s, read_s, token_s = profile.gpu_call_s, num_bytes / profile.gpu_bytes_per_s, macs / profile.gpu_macs_per_s

    def seconds(load: int) -> float:
        return call_s + max(read_s, token_s * load)

    return seconds


def _dense_seconds(profile: Profile, num_bytes: int, macs: float) -> tuple[float, float]:
    """Seconds to read dense weights once, and per token to compute with them, where they live."""
    if profile.gpu_bytes_per_s is not None and profile.gpu_macs_per_s is not None:
        return num_bytes / profile.gpu_bytes_per_s, macs / profile.gpu_macs_per_s
    return num_bytes / profile.cpu_bytes_per_s, macs / profile.cpu_macs_per_s
