"""What the server tells of itself: `/hybrimoe/stats`, `/metrics`, and the counters behind them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from hybrimoe_kt.core.stats import Stats
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.server.service import Service
from hybrimoe_kt.server.settings import Settings
from tests.support.by_modules import by_modules
from tests.support.generated_model import GeneratedModel, Shape

from .scripted import ScriptedEngine
from .serving import Serving, serving


@pytest.fixture(scope="module")
def hybrid(generated: Callable[[Shape], GeneratedModel]) -> Iterator[Serving]:
    """A generated model half of whose experts are in slots."""
    options = {"accelerator": "emulated", "cache_size": "50%", "cpu_backend": "torch_reference"}
    engine = build_engine(generated(Shape()).path, progress=False, option_overrides=options)
    with serving(engine) as running:
        asked = {"prompt": [3, 5, 7, 11], "max_tokens": 12, "ignore_eos": True}
        assert running.post("/v1/completions", asked).status_code == 200
        yield running


def samples(running: Serving) -> dict[str, float]:
    """Every sample of `/metrics`, labels in its name."""
    answer = running.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_the_heat_is_what_was_counted(hybrid: Serving) -> None:
    told = hybrid.http.get("/hybrimoe/stats").json()
    stats = hybrid.service.engine.runtime.coordinator.stats
    heat = told["heat"]
    assert told["num_layers"] == len(heat["hits"]) == len(heat["misses"])
    assert {len(layer) for layer in heat["hits"] + heat["misses"]} == {told["num_experts"]}
    hits, misses = (sum(map(sum, heat[kind])) for kind in ("hits", "misses"))
    assert hits == stats.hits > 0
    assert misses == stats.misses + stats.pending > 0
    assert told["hit_rate"] == pytest.approx(hits / (hits + misses))
    assert told["bytes_moved"] == stats.transferred_bytes + stats.prefetched_bytes > 0
    assert told["generated_tokens"] == hybrid.service.engine.last_run()["new_tokens"] > 1
    assert told["tokens_per_s"] > 0
    assert told["queue"] == {"active": 0, "waiting": 0, "limit": 64, "parallel": 1}
    assert told["accelerator"] == "emulated"
    top_k = hybrid.service.engine.model.config.num_experts_per_tok
    for ready, absent in zip(told["last_token"]["hits"], told["last_token"]["misses"], strict=True):
        assert len(ready) + len(absent) == len({*ready, *absent}) == top_k


def test_the_metrics_agree_with_it(hybrid: Serving) -> None:
    told, metrics = hybrid.http.get("/hybrimoe/stats").json(), samples(hybrid)
    assert metrics["hybrimoe_hit_rate"] == told["hit_rate"]
    assert metrics["hybrimoe_tokens_total/generated"] == told["generated_tokens"]
    assert metrics["hybrimoe_tokens_total/prompt"] >= 4
    assert metrics["hybrimoe_moved_bytes_total"] == told["bytes_moved"]
    assert metrics["hybrimoe_tokens_per_second"] == told["tokens_per_s"]
    assert metrics["hybrimoe_queue_limit"] == 64
    for resource in ("cpu", "gpu", "link"):
        assert metrics[f"hybrimoe_predicted_busy_share/{resource}"] > 0
        assert metrics[f"hybrimoe_busy_share/{resource}"] == told["busy_share"][resource]
    assert told["busy_is_measured"]
    assert told["busy_share"]["gpu"] > 0 < told["busy_share"]["host"]
    assert metrics["hybrimoe_requests_total//v1/completions/200"] >= 1
    assert metrics["process_resident_memory_bytes"] > 2**20


def test_the_moved_bytes_never_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """An aborted prefetch is taken back from the sum; a counter that falls reads as a restart."""
    engine, seen = ScriptedEngine(), []
    service, nothing = Service(engine, Settings()), engine.counters()
    for sent, taken_back in ((100, 0), (100, 40), (130, 40), (200, 0)):
        stats = Stats()
        stats.transferred_bytes, stats.prefetched_bytes = sent, 50 - taken_back
        counted = dataclasses.replace(nothing, statistics=stats.snapshot())
        monkeypatch.setattr(engine, "counters", lambda counted=counted: counted)
        text = service.metrics.text().decode()
        seen += re.findall(r"^hybrimoe_moved_bytes_total (.*)$", text, re.MULTILINE)
    assert [float(number) for number in seen] == [150, 150, 150, 250]


def test_failures_are_counted_for_good(
    generated: Callable[[Shape], GeneratedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An accelerator that is given up no longer serves, and keeps its counts."""
    options = {"accelerator": "emulated", "cache_size": "all", "cpu_backend": "torch_reference"}
    engine = build_engine(generated(Shape()).path, progress=False, option_overrides=options)
    with serving(engine) as running:
        before = samples(running)
        for name in ("failed_steps_total", "cache_shrunk_total", "abandoned"):
            assert before[f"hybrimoe_accelerator_{name}/emulated"] == 0
        assert before["hybrimoe_fallback/off"] == 1
        assert sum(value for name, value in before.items() if name.startswith("hybrimoe_fallback/")) == 1
        assert running.http.get("/hybrimoe/stats").json()["health"]["word"] == ""

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("injected")

        monkeypatch.setattr(engine.runtime.lanes[0].gpu, "launch", fail)
        assert running.post("/v1/completions", {"prompt": [3, 5, 7], "max_tokens": 4}).status_code == 200
        after = samples(running)
        assert after["hybrimoe_accelerator_failed_steps_total/emulated"] == 3
        assert after["hybrimoe_accelerator_abandoned/emulated"] == 1
        told = running.http.get("/hybrimoe/stats").json()
        assert (told["accelerator"], told["health"]["word"]) == ("none", "abandoned")


def test_a_server_goes_on_when_the_model_runs_out_of_memory(generated: Callable[[Shape], GeneratedModel]) -> None:
    options = {"accelerator": "emulated", "cache_size": 1, "cpu_backend": "torch_reference"}
    engine = build_engine(generated(Shape()).path, progress=False, option_overrides=options)
    engine.end_ids = set()
    is_full = True

    def attend(*_: object) -> None:
        if is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")

    by_modules(engine)
    engine.model.model.layers[-1].self_attn.register_forward_pre_hook(attend)
    ask = {"prompt": [3, 5, 7], "max_tokens": 4}
    with serving(engine) as running:
        refused = running.post("/v1/completions", ask)
        assert refused.status_code == 500
        assert "smaller --cache_size" in refused.json()["error"]["message"]
        assert samples(running)["hybrimoe_accelerator_cache_shrunk_total/emulated"] == 1
        is_full = False
        assert running.post("/v1/completions", ask).json()["usage"]["completion_tokens"] == 4


def test_odd_paths_do_not_become_labels(hybrid: Serving) -> None:
    for number in range(3):
        hybrid.http.get(f"/no/{number}")
    metrics = samples(hybrid)
    assert metrics["hybrimoe_requests_total/other/404"] >= 3
    assert not any("/no/" in name for name in metrics)
