"""The numbers of a running server: what the page draws, and parts of what `/metrics` tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .service import Service

__all__ = ["busy_shares", "moved_bytes", "page_stats", "tokens_per_s"]


def tokens_per_s(service: Service) -> float:
    """Decoding speed of the answer being given, or of the last one until there is anything to tell."""
    current = float(service.engine.last_run()["decode_tokens_per_s"])
    return current or service.metrics.last_tokens_per_s


def moved_bytes(stats: Mapping[str, float]) -> int:
    """Expert bytes sent to accelerators since the start, on demand and ahead of it."""
    return int(stats.get("transferred_bytes", 0) + stats.get("prefetched_bytes", 0))


def busy_shares(stats: Mapping[str, float]) -> dict[str, float]:
    """Share of the predicted time that each resource was predicted to be busy, 0 to 1."""
    elapsed_s = stats.get("elapsed_s", 0.0)
    return {name: stats[f"{name}_busy_s"] / elapsed_s if elapsed_s else 0.0 for name in ("cpu", "gpu", "link")}


def page_stats(service: Service) -> dict[str, Any]:
    """Everything since the start, `[num_layers][num_experts]` in `heat`, expert ids by layer in `last_token`."""
    engine, queue = service.engine, service.queue
    runtime = engine.runtime
    coordinator = runtime.coordinator
    stats = runtime.statistics()
    heat = coordinator.heat() if coordinator else {"hits": [], "misses": []}
    current = engine.last_run()["new_tokens"] if queue.num_active else 0
    return {
        "model": service.model_name,
        "accelerator": ", ".join(accelerator.name for accelerator in runtime.accelerators) or "none",
        "health": runtime.health().as_dict(),
        "num_layers": len(heat["hits"]),
        "num_experts": max(map(len, heat["hits"]), default=0),
        "tokens_per_s": tokens_per_s(service),
        "hit_rate": stats.get("hit_rate", 0.0),
        "bytes_moved": moved_bytes(stats),
        "busy_share": busy_shares(stats) if coordinator else {},
        "generated_tokens": service.metrics.generated_tokens + current,
        "queue": {"active": queue.num_active, "waiting": queue.num_waiting, "limit": queue.max_waiting},
        "heat": heat,
        "last_token": coordinator.last_token() if coordinator else {"hits": [], "misses": []},
    }
