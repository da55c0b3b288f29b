"""A recorded run, replayed through the simulator's driver, makes the very same decisions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe_kt.core.types import Plan, Routing
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.sim.record import Recorder
from hybrimoe_kt.sim.replay import decisions
from hybrimoe_kt.sim.trace_file import read_trace
from tests.support.generated_model import GeneratedModel, Shape


@pytest.mark.parametrize("predictor", ["stale_gate", "transition"])
@pytest.mark.parametrize("policy", ["adaptive", "mrs"])
def test_runtime_and_replay_decide_alike(
    generated: Callable[[Shape], GeneratedModel], tmp_path: Path, policy: str, predictor: str
) -> None:
    model = generated(Shape(layers=4, experts=16, top_k=4))
    overrides = {
        "accelerator": "emulated", "cache_size": 4, "cpu_backend": "torch_reference", "policy": policy,
        "prefetch_size": 2, "prefetch_depth": 2, "predictor": predictor,
    }  # fmt: skip
    engine = build_engine(model.path, progress=False, option_overrides=overrides)
    coordinator = engine.runtime.coordinator
    assert coordinator is not None
    specs = engine.runtime.layer_specs()
    engine.runtime.recorder = recorder = Recorder(engine.model_name, specs)
    plans: list[Plan] = []
    decide = coordinator.plan

    def spy(routing: Routing) -> Plan:
        plans.append(decide(routing))
        return plans[-1]

    coordinator.plan = spy  # type: ignore[method-assign]
    engine.end_ids = set()
    list(engine.tokens(list(range(11, 40)), Sampling(max_new_tokens=40, temperature=0)))

    fresh = engine.runtime.new_coordinator()
    fresh.initial_transfers()
    replayed = decisions(read_trace(recorder.save(tmp_path / "run.trace")), fresh)
    assert len(plans) == len(replayed) == 40 * 4
    assert any(plan.transfers for plan in plans)
    assert replayed == plans
    assert fresh.stats.snapshot() == coordinator.stats.snapshot()
