"""What a runtime is, as a line for people and as data for recordings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import RECORDED_SPEC
from hybrimoe_kt.device.host_store import HostStore

from .assembly import Assembly

__all__ = ["configuration", "describe"]


def configuration(options: ExpertOptions, store: HostStore, assembly: Assembly) -> dict[str, Any]:
    """What decisions follow from, beside the routing, as plain data; layers in order."""
    experts = [store.layers[spec.layer] for spec in assembly.specs]
    return (
        options.strategy.as_dict()
        | {key: [getattr(spec, name) for spec in assembly.specs] for key, name in RECORDED_SPEC.items()}
        | {"expert_macs": [3 * layer.hidden * layer.inter for layer in experts]}
        | {"profile": asdict(assembly.profile)}
    )


def describe(options: ExpertOptions, store: HostStore, assembly: Assembly) -> str:
    """One line: what was decided."""
    executor = assembly.executor
    num_experts = sum(experts.num_experts for experts in store.layers.values())
    where = f"{len(store.layers)} MoE layers, {num_experts} experts, {store.num_bytes / 1e9:.2f} GB"
    threads = getattr(executor.cpu, "num_threads", 0)
    cpu = executor.cpu.describe() + (f" ({threads} thread{'s' * (threads != 1)})" if threads else "")
    if not executor.lanes:
        return f"{where}; all on the CPU: {cpu}"
    lanes = "; ".join(
        f"{lane.accelerator.name}: {lane.pool.num_slots} slots, {lane.pool.num_bytes / 1e9:.2f} GB"
        for lane in executor.lanes
    )
    return (
        f"{where}; {lanes}; CPU: {cpu}; {options.scheduler} scheduler, {options.strategy.policy} policy, "
        f"prefetch {options.prefetch_size or 'off'}, profile {assembly.profile.name}"
    )
