"""The numbers of a running server, for Prometheus and the page: read when asked for, so that answers pay nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hybrimoe_kt.engine.events import Finished
from hybrimoe_kt.runtime import Health

from .engine import Engine
from .queue import AnswerQueue

__all__ = ["Metrics", "Tally"]

_SECONDS = 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200
_TOKEN_SECONDS = 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10
_SIZES = 1, 2, 3, 4, 6, 8, 12, 16, 32
"""Upper ends of what the histograms count."""
_FALLBACK_STATES = "off", "hybrid", "trying cpu_only", "trying gpu_only", "cpu_only", "gpu_only"


class Tally:
    """Counts requests and answers."""

    def __init__(self) -> None:
        self.generated_tokens = 0
        """Of all answers that have ended."""
        self.last_tokens_per_s = 0.0
        self.registry = CollectorRegistry()
        self._requests = Counter("hybrimoe_requests", "Requests answered", ("path", "status"), registry=self.registry)
        self._answers = Counter("hybrimoe_answers", "Answers given", ("finish",), registry=self.registry)
        self._tokens = Counter(
            "hybrimoe_tokens", "Tokens of prompts, of these reused, and of answers", ("kind",), registry=self.registry
        )
        self._seconds = Counter(
            "hybrimoe_answer_seconds", "Time spent on prompts and answers", ("phase",), registry=self.registry
        )
        for kind in ("prompt", "reused", "generated"):
            self._tokens.labels(kind)
        self._first = Histogram(
            "hybrimoe_first_token_seconds", "From a request to the first text of its answer", registry=self.registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self._between = Histogram(
            "hybrimoe_token_seconds", "From one token of an answer to its next", registry=self.registry,
            buckets=_TOKEN_SECONDS,
        )  # fmt: skip
        self._batch = Histogram(
            "hybrimoe_batch_size", "Answers that a step had begun", registry=self.registry, buckets=_SIZES
        )
        self._prompts = Counter(
            "hybrimoe_prompts", "Prompts by whether a kept conversation begins like them", ("prefix",),
            registry=self.registry,
        )  # fmt: skip
        for found in ("hit", "miss"):
            self._prompts.labels(found)

    def count_first_token(self, seconds: float) -> None:
        """So long after its request an answer's first text has come."""
        self._first.observe(seconds)

    def count_step(self, num_answers: int) -> None:
        """A step was made with so many answers begun."""
        self._batch.observe(num_answers)

    def count_request(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, finished: Finished) -> None:
        """Count an answer, whatever ended it."""
        run = finished.run
        self._answers.labels(finished.reason).inc()
        self._tokens.labels("prompt").inc(run["prompt_tokens"])
        self._tokens.labels("reused").inc(run["reused_tokens"])
        self._tokens.labels("generated").inc(run["new_tokens"])
        self._prompts.labels("hit" if run["reused_tokens"] else "miss").inc()
        self.generated_tokens += run["new_tokens"]
        for seconds in run.get("between_s", ()):
            self._between.observe(seconds)
        self.last_tokens_per_s = run["decode_tokens_per_s"] or self.last_tokens_per_s
        self._seconds.labels("prompt").inc(run["prefill_s"])
        self._seconds.labels("answer").inc(run["decode_s"])


class Metrics:
    """Everything that `/metrics` and `/hybrimoe/stats` tell of one server."""

    def __init__(self, engine: Engine, queue: AnswerQueue, tally: Tally) -> None:
        self._engine, self._queue, self._tally = engine, queue, tally
        self._moved_bytes = 0
        ProcessCollector(registry=tally.registry)
        tally.registry.register(self)

    def page_stats(self, model_name: str) -> dict[str, Any]:
        """Everything since the start, `[num_layers][num_experts]` in `heat`, expert ids by layer in `last_token`."""
        queue, counters = self._queue, self._engine.counters()
        stats, hits = counters.statistics, counters.hits
        return {
            "model": model_name,
            "accelerator": ", ".join(counters.accelerators) or "none",
            "health": counters.health.as_dict(),
            "num_layers": len(hits),
            "num_experts": max(map(len, hits), default=0),
            "tokens_per_s": self._tokens_per_s(),
            "hit_rate": stats.get("hit_rate", 0.0),
            "bytes_moved": _moved_bytes(stats),
            "busy_share": counters.busy or (_predicted_shares(stats) if stats else {}),
            "busy_is_measured": bool(counters.busy),
            "generated_tokens": self._tally.generated_tokens + queue.num_current_tokens,
            "queue": {
                "active": queue.num_active,
                "waiting": queue.num_waiting,
                "limit": queue.max_waiting,
                "parallel": queue.parallel,
            },
            "heat": {"hits": hits, "misses": counters.misses},
            "last_token": {"hits": counters.last_hits, "misses": counters.last_misses},
        }

    def _tokens_per_s(self) -> float:
        """Decoding speed of all answers being given, or of the last one until there is anything to tell."""
        return self._queue.tokens_per_s() or self._tally.last_tokens_per_s

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._tally.registry)

    def collect(self) -> Iterator[Metric]:
        """What the model and the queue count themselves."""
        counters, queue = self._engine.counters(), self._queue
        yield _gauge("tokens_per_second", "Of all answers being given, or of the last one", self._tokens_per_s())
        yield _gauge("queue_active", "Answers being given", queue.num_active)
        yield _gauge("queue_waiting", "Requests waiting", queue.num_waiting)
        yield _gauge("parallel", "Answers that may be given at once", queue.parallel)
        yield _gauge("queue_limit", "Requests that may wait", queue.max_waiting)
        yield from _health(counters.health)
        if counters.kept:
            yield _gauge("kept_conversations", "Conversations kept to go on from", counters.kept["conversations"])
            yield _gauge("kept_bytes", "Memory they take", counters.kept["bytes"])
        seconds = CounterMetricFamily(
            "hybrimoe_step_seconds", "Measured on the host: all steps, and what went into experts", labels=("part",)
        )
        for part, value in counters.seconds.items():
            seconds.add_metric((part,), value)
        yield seconds
        yield _shares("busy_share", "Measured share of the experts' steps, now and then", counters.busy)
        stats = counters.statistics
        if not stats:
            return
        yield _gauge("hit_rate", "Routed experts found on the accelerator, since the start", stats["hit_rate"])
        experts = CounterMetricFamily("hybrimoe_experts", "Routed experts by residency", labels=("residency",))
        for residency, name in (("hit", "hits"), ("pending", "pending"), ("miss", "misses")):
            experts.add_metric((residency,), stats[name])
        yield experts
        self._moved_bytes = max(self._moved_bytes, _moved_bytes(stats))  # a prefetch may be taken back, a counter not
        yield CounterMetricFamily("hybrimoe_moved_bytes", "Expert bytes moved to accelerators", self._moved_bytes)
        yield _shares("predicted_busy_share", "Predicted share of the time", _predicted_shares(stats))


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


def _shares(name: str, help_text: str, shares: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"hybrimoe_{name}", help_text, labels=("resource",))
    for resource, share in shares.items():
        family.add_metric((resource,), share)
    return family


def _moved_bytes(stats: Mapping[str, float]) -> int:
    """Expert bytes sent to accelerators since the start, on demand and ahead of it."""
    return int(stats.get("transferred_bytes", 0) + stats.get("prefetched_bytes", 0))


def _predicted_shares(stats: Mapping[str, float]) -> dict[str, float]:
    """Share of the predicted time that each resource was predicted to be busy, 0 to 1."""
    elapsed_s = stats.get("elapsed_s", 0.0)
    return {name: stats[f"{name}_busy_s"] / elapsed_s if elapsed_s else 0.0 for name in ("cpu", "gpu", "link")}
