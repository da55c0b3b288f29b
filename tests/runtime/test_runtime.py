"""One layer through the runtime: chunks, dtypes, failures half-way, and nothing kept that grows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.readback import Step
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.runtime import Routed, Runtime
from hybrimoe_kt.runtime.routing import routing_of
from tests.support.generated_model import GeneratedModel, Shape

Make = Callable[[Shape], GeneratedModel]
BACKENDS = ["torch_reference", "llamafile"]


def runtime(generated: Make, **overrides: Any) -> Runtime:
    if overrides.get("cpu_backend") == "llamafile":
        pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    return load_model(generated(Shape()).path, option_overrides=overrides, progress=False).runtime


def step(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_tokens, 8, generator=generator).argsort(dim=1)[:, :2]
    return torch.randn(num_tokens, 256, generator=generator), ids, torch.rand(num_tokens, 2, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_do_not_overwrite_each_other(generated: Make, backend: str) -> None:
    """The CPU backend answers in a buffer it uses again; a chunk's result must survive the next chunk."""
    whole = runtime(generated, cpu_backend=backend, accelerator="none", max_chunk_tokens=64)
    pieces = runtime(generated, cpu_backend=backend, accelerator="none", max_chunk_tokens=8)
    inputs = step(30)
    wanted, found = whole.run(0, Routed(*inputs)), pieces.run(0, Routed(*inputs))
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert wanted.norm() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_survive_the_next_step(generated: Make, backend: str) -> None:
    ours = runtime(generated, cpu_backend=backend, accelerator="none")
    first = ours.run(0, Routed(*step(1)))
    kept = first.clone()
    ours.run(1, Routed(*step(1, seed=1)))
    assert torch.equal(first, kept)


def test_the_models_dtype_comes_back(generated: Make) -> None:
    ours = runtime(generated, cpu_backend="torch_reference")
    hidden, ids, weights = step(3)
    found = ours.run(0, Routed(hidden.bfloat16(), ids, weights.bfloat16()))
    assert found.dtype == torch.bfloat16
    wanted = ours.run(0, Routed(hidden, ids, weights))
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["gpu", "transfer", "prefetch"])
def test_an_accelerator_that_fails_changes_no_answer(
    generated: Make, monkeypatch: pytest.MonkeyPatch, backend: str, where: str
) -> None:
    """Also with kt-kernel computing beside it; tests/device/test_faults.py strikes every operation."""
    monkeypatch.setattr(Lane, "note_failure", lambda lane: False)  # however often
    overrides = {"accelerator": "emulated", "cache_size": 2, "cpu_backend": backend, "scheduler": "paper"}
    ours = runtime(generated, **overrides)
    wanted = runtime(generated, cpu_backend="torch_reference", accelerator="none")
    lane = ours.lanes[0]
    owner, name = {
        "gpu": (lane.gpu, "launch"),
        "transfer": (lane.queue, "start"),
        "prefetch": (lane.queue, "enqueue"),
    }[where]
    for seed in range(12):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, _fail)
            for inputs in (step(3, seed=seed), step(1, seed=seed)):
                found, reference = ours.run(0, Routed(*inputs)), wanted.run(0, Routed(*inputs))
                assert (found - reference).norm() < 0.03 * reference.norm()
        ours.coordinator.check_integrity()
        inputs = step(3, seed=100 + seed)
        found, reference = ours.run(0, Routed(*inputs)), wanted.run(0, Routed(*inputs))
        assert (found - reference).norm() < 0.03 * reference.norm()
    assert not ours.health().is_clean, "the fault was never reached"


def test_a_cpu_backend_that_refuses_is_an_error_and_the_next_step_works(
    generated: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = runtime(generated, cpu_backend="torch_reference", accelerator="emulated", cache_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(ours.executor.cpu, "submit", _fail)
        with pytest.raises(RuntimeError, match="injected"):
            ours.run(
                0, Routed(*step(16))
            )  # with so many tokens every expert is routed to, and two slots are not enough
    ours.coordinator.check_integrity()
    assert ours.run(0, Routed(*step(3))).isfinite().all()


def _fail(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("injected")


def test_nothing_accumulates_over_steps(generated: Make) -> None:
    ours = runtime(generated, cpu_backend="torch_reference", accelerator="emulated", cache_size=3, prefetch_size=4)
    for seed in range(200):
        for layer in (0, 1):
            ours.run(layer, Routed(*step(1, seed=2 * seed + layer)))
    assert len(ours.lanes[0].queue.waiting) <= 4, "prefetches pile up"
    assert ours.coordinator.stats.num_plans == 400


def test_not_finite_is_refused_before_anything_is_planned(generated: Make) -> None:
    ours = runtime(generated, cpu_backend="torch_reference")
    hidden, ids, weights = step(2)
    plans = ours.coordinator.stats.num_plans
    for bad in (float("nan"), float("inf")):
        with pytest.raises(KernelError, match="layer 0 are not finite"):
            ours.run(0, Routed(torch.full_like(hidden, bad), ids, weights))
    assert ours.coordinator.stats.num_plans == plans


def test_routing_in_plain_numbers() -> None:
    ids, weights = torch.tensor([[3, 1], [1, 0]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    step = Step.on_host(Routed(torch.zeros(2, 1), ids, weights), torch.full((4,), 0.25))
    routing = routing_of(4, step, None)
    assert dict(routing.loads) == {3: 1, 1: 2, 0: 1}
    assert routing.weights == {3: 0.75, 1: 0.75, 0: 0.5}
    assert routing.scores == [0.25] * 4
    assert (routing.layer, routing.num_tokens) == (4, 2)


@pytest.mark.parametrize(("policy", "reads"), [("adaptive", False), ("mrs", True)])
def test_scores_come_to_the_host_only_where_they_are_read(generated: Make, policy: str, reads: bool) -> None:
    ours = runtime(generated, cpu_backend="torch_reference", accelerator="emulated", cache_size=3, policy=policy)
    inputs = step(1)
    job = ours.begin(0, Routed(*inputs, torch.randn(1, 8)))
    assert ours.wants_scores is reads
    assert job.routing is not None and (job.routing.scores is not None) is reads
    assert ours.finish(job).isfinite().all()
