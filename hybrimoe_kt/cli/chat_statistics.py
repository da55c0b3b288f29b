"""What `/stats` says: an engine's counters as a few readable lines, and whatever is left of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybrimoe_kt.host.last_runs import failure_text
from hybrimoe_kt.sizes import size_text

from .chat_output import flatten, visible

__all__ = ["answer_rows", "health_text", "total_rows"]

Row = tuple[str, str]


class _Line(NamedTuple):
    """A line made of several counters; an empty text leaves it out."""

    title: str
    counters: tuple[str, ...]
    text: Callable[..., str]


def answer_rows(run: Mapping[str, Any]) -> list[Row]:
    """Return the lines of one answer (`Engine.last_run`)."""
    return _rows(run, _ANSWER)


def total_rows(statistics: Mapping[str, Any]) -> list[Row]:
    """Return the lines of all answers so far (`Engine.statistics`)."""
    return _rows(statistics, _TOTAL)


def health_text(health: Mapping[str, Any]) -> str:
    """What failed since the start, and what the fallback decided, from `Health` as plain data; empty if clean."""
    told = {name: failure_text(counts) for name, counts in health["accelerators"].items()}
    parts = [f"{name}: {text}" for name, text in told.items() if text]
    if health["fallback"] in ("cpu_only", "gpu_only"):
        parts.append(f"fallen back to {health['fallback']}")
    return "; ".join(parts)


def _rows(values: Mapping[str, Any], lines: tuple[_Line, ...]) -> list[Row]:
    left = dict(values)
    rows = []
    for line in lines:
        if all(name in values for name in line.counters):
            text = line.text(*(left.pop(name) for name in line.counters))
            rows += [(line.title, visible(text))] if text else []
    return rows + [(name, text) for name, text in flatten(left) if text != "0"]


def _prompt(tokens: int, seconds: float, rate: float, reused: int) -> str:
    kept = f", {reused} known from before" if reused else ""
    return f"{_tokens(tokens)} in {seconds:.2f} s, {rate:.1f}/s{kept}"


def _answer(tokens: int, seconds: float, rate: float, finish: str) -> str:
    why = {"stop": "", "length": ", the longest allowed", "cancelled": ", stopped"}.get(finish, f", {finish}")
    return f"{_tokens(tokens)} in {seconds:.2f} s, {rate:.1f}/s{why}"


def _experts(on_cpu: int, on_gpu: int) -> str:
    return f"{on_cpu} computed on the CPU, {on_gpu} on the GPU"


def _hit_rate(hits: int, misses: int, rate: float, pending: int = 0) -> str:
    coming = f", {pending} on their way" if pending else ""
    return f"{rate:.0%} ({hits} of {hits + pending + misses} in a slot{coming})" if hits + pending else ""


def _transfers(count: int, num_bytes: int, failed: int = 0) -> str:
    broken = f", {failed} failed" if failed else ""
    return f"{count} when needed, {size_text(num_bytes)}{broken}" if count or failed else ""


def _prefetches(count: int, num_bytes: int, useful: int, wasted: int, wasted_bytes: int, aborted: int) -> str:
    if not count:
        return ""
    parts = f"{useful} used, {wasted} evicted unused ({size_text(wasted_bytes)}), {aborted} taken back"
    return f"{count} ahead of need, {size_text(num_bytes)}: {parts}"


def _guesses(guessed: int, right: int, routed: int, precision: float, recall: float) -> str:
    return f"{right} of {guessed} right ({precision:.0%}), {recall:.0%} of {routed} needed" if guessed else ""


def _busy(cpu_s: float, gpu_s: float, link_s: float, elapsed_s: float, makespan_s: float) -> str:
    if not elapsed_s or not gpu_s + link_s:
        return ""
    shares = ", ".join(f"{name} {s / elapsed_s:.0%}" for name, s in (("CPU", cpu_s), ("GPU", gpu_s), ("link", link_s)))
    return f"{shares}, experts {makespan_s / elapsed_s:.0%} of the predicted time"


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


_EXPERTS = _Line("experts", ("experts_on_cpu", "experts_on_gpu"), _experts)
_ANSWER = (
    _Line("prompt", ("prompt_tokens", "prefill_s", "prefill_tokens_per_s", "reused_tokens"), _prompt),
    _Line("answer", ("new_tokens", "decode_s", "decode_tokens_per_s", "finish"), _answer),
    _EXPERTS,
    _Line("", ("health",), lambda health: ""),  # of all answers: told below
    _Line("hit rate", ("hits", "misses", "hit_rate"), _hit_rate),
    _Line("transfers", ("transfers", "transferred_bytes"), _transfers),
)
_TOTAL = (
    _Line("model", ("model",), str),
    _Line("runs as", ("runtime",), str),
    _Line("context", ("context_tokens",), _tokens),
    _Line("failures", ("health",), health_text),
    _Line("layer steps", ("num_plans",), str),
    _EXPERTS,
    _Line("hit rate", ("hits", "misses", "hit_rate", "pending"), _hit_rate),
    _Line("transfers", ("num_transfers", "transferred_bytes", "num_failed"), _transfers),
    _Line(
        "prefetches",
        ("num_prefetches", "prefetched_bytes", "useful_prefetches", "wasted_prefetches", "wasted_bytes", "num_aborted"),
        _prefetches,
    ),
    _Line("guesses", ("predicted", "predicted_right", "predicted_routed", "precision", "recall"), _guesses),
    _Line("busy", ("cpu_busy_s", "gpu_busy_s", "link_busy_s", "elapsed_s", "makespan_s"), _busy),
)
