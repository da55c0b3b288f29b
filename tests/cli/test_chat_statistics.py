"""`/stats` in words: what is zero or does not apply is left out, what is unknown is not."""

from __future__ import annotations

from hybrimoe_kt.cli.chat_statistics import answer_rows, total_rows
from hybrimoe_kt.core.stats import Stats
from hybrimoe_kt.engine.engine import Run
from hybrimoe_kt.runtime.health import AcceleratorHealth, Health

RUN = Run(prompt_tokens=10, reused_tokens=4, new_tokens=1, prefill_s=0.5, finish="length", misses=3, experts_on_cpu=3)


def test_an_answer_on_the_cpu() -> None:
    rows = dict(answer_rows(RUN.as_dict()))
    assert rows == {
        "prompt": "10 tokens in 0.50 s, 12.0/s, 4 known from before",
        "answer": "1 token in 0.00 s, 0.0/s, the longest allowed",
        "experts": "3 computed on the CPU, 0 on the GPU",
    }


def test_an_answer_beside_an_accelerator() -> None:
    run = Run(hits=3, misses=1, experts_on_gpu=4, transfers=2, transferred_bytes=3 * 2**20, prefetches=5).as_dict()
    rows = dict(answer_rows(run))
    assert rows["hit rate"] == "75% (3 of 4 in a slot)"
    assert rows["transfers"] == "2 when needed, 3.0 MiB"
    assert rows["prefetches"] == "5"


def test_all_answers() -> None:
    stats = Stats()
    for name, value in {
        "hits": 6, "pending": 1, "misses": 3, "num_transfers": 2, "transferred_bytes": 2**20, "num_failed": 1,
        "num_prefetches": 4, "prefetched_bytes": 2**21, "useful_prefetches": 3, "wasted_prefetches": 1,
        "wasted_bytes": 2**19, "predicted": 8, "predicted_right": 6, "predicted_routed": 12, "cpu_busy_s": 0.5,
        "gpu_busy_s": 1.0, "link_busy_s": 0.25, "elapsed_s": 2.0, "makespan_s": 1.0, "num_streamed": 7,
    }.items():  # fmt: skip
        setattr(stats, name, value)
    rows = dict(total_rows({"model": "m", "runtime": "r", "context_tokens": 1024} | stats.snapshot()))
    assert rows["hit rate"] == "60% (6 of 10 in a slot, 1 on their way)"
    assert rows["transfers"] == "2 when needed, 1.0 MiB, 1 failed"
    assert rows["prefetches"] == "4 ahead of need, 2.0 MiB: 3 used, 1 evicted unused (512.0 KiB), 0 taken back"
    assert rows["guesses"] == "6 of 8 right (75%), 50% of 12 needed"
    assert rows["busy"] == "CPU 25%, GPU 50%, link 12%, experts 50% of the predicted time"
    assert rows["num_streamed"] == "7"  # no words for it, and not lost


FAILED = Health(
    {"cuda": AcceleratorHealth(failed_steps=3, given_up=True, last_failure="x\x1b"), "cuda:1": AcceleratorHealth()},
    "cpu_only",
)


def test_failures() -> None:
    run = RUN.as_dict() | {"health": FAILED.as_dict()}
    assert not [name for name, _ in answer_rows(run) if "health" in name]  # it is of all answers
    assert dict(total_rows({"health": FAILED.as_dict()})) == {
        "failures": "cuda: 3 failed steps (x), given up; fallen back to cpu_only"
    }
    assert total_rows({"health": Health({"cuda": AcceleratorHealth()}).as_dict()}) == []


def test_every_counter_finds_its_way() -> None:
    """A counter that is added to the engine shows up, by its name at least."""
    ones = dict.fromkeys(Stats().snapshot(), 1) | {"brand_new": {"inner": 2}}
    shown = " ".join(f"{name} {text}" for name, text in total_rows({"context_tokens": 1} | ones))
    assert "brand_new.inner 2" in shown
