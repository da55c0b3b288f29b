"""Prometheus metrics: read when they are asked for, so that they cost an answer nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hybrimoe_kt.runtime import Health

from .answer import End
from .stats import busy_shares, moved_bytes, tokens_per_s

if TYPE_CHECKING:
    from .service import Service

__all__ = ["Metrics"]

_FALLBACK_STATES = "off", "hybrid", "trying cpu_only", "trying gpu_only", "cpu_only", "gpu_only"


class Metrics:
    """Everything `/metrics` tells of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.generated_tokens = 0
        """Of all answers that have ended."""
        self.last_tokens_per_s = 0.0
        self._moved_bytes = 0
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        self._requests = Counter("hybrimoe_requests", "Requests answered", ("path", "status"), registry=self._registry)
        self._answers = Counter("hybrimoe_answers", "Answers given", ("finish",), registry=self._registry)
        self._tokens = Counter(
            "hybrimoe_tokens", "Tokens of prompts, of these reused, and of answers", ("kind",), registry=self._registry
        )
        self._seconds = Counter(
            "hybrimoe_answer_seconds", "Time spent on prompts and answers", ("phase",), registry=self._registry
        )
        for kind in ("prompt", "reused", "generated"):
            self._tokens.labels(kind)

    def count_request(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, end: End) -> None:
        """Count an answer, whatever ended it."""
        run = end.run
        self._answers.labels(end.finish).inc()
        self._tokens.labels("prompt").inc(run["prompt_tokens"])
        self._tokens.labels("reused").inc(run["reused_tokens"])
        self._tokens.labels("generated").inc(run["new_tokens"])
        self.generated_tokens += run["new_tokens"]
        self.last_tokens_per_s = run["decode_tokens_per_s"] or self.last_tokens_per_s
        self._seconds.labels("prompt").inc(run["prefill_s"])
        self._seconds.labels("answer").inc(run["decode_s"])

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the model and the queue count themselves."""
        engine, queue = self._service.engine, self._service.queue
        yield _gauge("tokens_per_second", "Of the answer being given, or the last one", tokens_per_s(self._service))
        yield _gauge("queue_active", "Answers being given", queue.num_active)
        yield _gauge("queue_waiting", "Requests waiting", queue.num_waiting)
        yield _gauge("queue_limit", "Requests that may wait", queue.max_waiting)
        yield from _health(engine.runtime.health())
        stats = engine.runtime.statistics()
        if not stats:
            return
        yield _gauge("hit_rate", "Routed experts found on the accelerator, since the start", stats["hit_rate"])
        experts = CounterMetricFamily("hybrimoe_experts", "Routed experts by residency", labels=("residency",))
        for residency, name in (("hit", "hits"), ("pending", "pending"), ("miss", "misses")):
            experts.add_metric((residency,), stats[name])
        yield experts
        self._moved_bytes = max(self._moved_bytes, moved_bytes(stats))  # a prefetch may be taken back, a counter not
        yield CounterMetricFamily("hybrimoe_moved_bytes", "Expert bytes moved to accelerators", self._moved_bytes)
        shares = GaugeMetricFamily("hybrimoe_busy_share", "Predicted share of the time", labels=("resource",))
        for resource, share in busy_shares(stats).items():
            shares.add_metric((resource,), share)
        yield shares


def _health(health: Health) -> Iterator[Metric]:
    """What failed and was answered all the same; an accelerator that was given up keeps its counts."""
    labels = ("accelerator",)
    failed = CounterMetricFamily(
        "hybrimoe_accelerator_failed_steps", "Layer steps the CPU computed instead", labels=labels
    )
    shrunk = CounterMetricFamily("hybrimoe_accelerator_cache_shrunk", "Times the expert cache shrank", labels=labels)
    abandoned = GaugeMetricFamily("hybrimoe_accelerator_abandoned", "Whether it is not asked any more", labels=labels)
    for name, accelerator in health.accelerators.items():
        failed.add_metric((name,), accelerator.failed_steps)
        shrunk.add_metric((name,), accelerator.shrunk)
        abandoned.add_metric((name,), accelerator.given_up)
    yield from (failed, shrunk, abandoned)
    fallback = GaugeMetricFamily("hybrimoe_fallback", "1 for what the fallback does", labels=("state",))
    for state in dict.fromkeys((*_FALLBACK_STATES, health.fallback)):
        fallback.add_metric((state,), state == health.fallback)
    yield fallback


def _gauge(name: str, help_text: str, value: Any) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"hybrimoe_{name}", help_text, value)
