"""Steps as engines make them: ranks with nothing to do, padding, trials, several requests at once, failures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.errors import DeadlineError, KernelError
from hybrimoe_kt.host.engines import experts as engine_experts
from hybrimoe_kt.host.engines.experts import EngineExperts, EngineStep
from hybrimoe_kt.host.engines.gates import EngineGate
from hybrimoe_kt.host.engines.share import RankShare
from hybrimoe_kt.runtime import assemble
from tests.device.machine import CHUNK, EXPERTS, HIDDEN, LAYERS, TOP_K, layers

MACHINES: dict[str, dict[str, Any]] = {
    "CPU": {"accelerator": "none"},
    "emulated, none cached": {"accelerator": "emulated", "cache_size": 0},
    "emulated, half cached": {"accelerator": "emulated", "cache_size": 2},
    "emulated, all cached": {"accelerator": "emulated", "cache_size": "all"},
    "adversarial": {"accelerator": "emulated:adversarial:3", "cache_size": 2},
}
RANKS = [[0, 1, 2], list(range(3, EXPERTS))]


class Scored:
    """Routers of made-up models, one a layer."""

    def __init__(self, layer: int) -> None:
        generator = torch.Generator().manual_seed(layer)
        self.weight = torch.randn(EXPERTS, HIDDEN, generator=generator)

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = hidden.float() @ self.weight.T
        return logits, logits.topk(TOP_K).indices


def table(experts: list[int]) -> torch.Tensor:
    found = torch.full((EXPERTS,), -1)
    found[experts] = torch.arange(len(experts))
    return found


def made(
    machine: str = "CPU", mine: list[int] | None = None, *, has_gates: bool = True, **options: Any
) -> EngineExperts:
    given = (
        {"cpu_backend": "torch_reference", "cpu_threads": 1, "max_chunk_tokens": CHUNK} | MACHINES[machine] | options
    )
    ours = EngineExperts(ExpertOptions(**given))
    for layer in layers():
        local_of = None if mine is None else table(mine)
        gate = EngineGate(layer.layer, Scored(layer.layer), torch.ones(HIDDEN), local_of)
        ours.add(RankShare(mine).of(layer), gate if has_gates else None, local_of)
    ours.start()
    return ours


def step(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return torch.randn(rows, HIDDEN, generator=generator), ids, torch.rand(rows, TOP_K, generator=generator)


def through(ours: EngineExperts, inputs: Any, known: EngineStep = EngineStep()) -> list[torch.Tensor]:  # noqa: B008
    """Every layer's answer of one step."""
    answers = []
    for layer in range(LAYERS):
        if ours.wants_logits:
            ours.note_logits(Scored(layer)(inputs[0])[0])
        answers.append(ours.run(layer, *inputs, known))
    return answers


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rows", [1, 3, 2 * CHUNK])
def test_ranks_add_up_to_the_whole_model(machine: str, rows: int) -> None:
    whole, ranks = made(), [made(machine, mine) for mine in RANKS]
    for seed in range(4):
        inputs = step(rows, seed)
        wanted, parts = through(whole, inputs), [through(rank, inputs) for rank in ranks]
        for layer in range(LAYERS):
            torch.testing.assert_close(sum(part[layer] for part in parts), wanted[layer], rtol=1e-4, atol=1e-4)


def test_ranks_whose_routers_are_not_shown_add_up_as_well() -> None:
    inputs = step(3)
    parts = [through(made(mine=mine, has_gates=False), inputs) for mine in RANKS]
    for layer, wanted in enumerate(through(made(), inputs)):
        torch.testing.assert_close(sum(part[layer] for part in parts), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("rows", [1, 4])
def test_a_rank_may_have_nothing_to_do(machine: str, rows: int) -> None:
    rank = made(machine, RANKS[1])
    hidden, _, weights = step(rows)
    foreign = torch.arange(TOP_K).expand(rows, TOP_K) % len(RANKS[0])
    before = rank.runtime.statistics()["num_plans"]
    for answer in through(rank, (hidden, foreign, weights)):
        assert torch.equal(answer, torch.zeros_like(hidden))
    assert rank.runtime.statistics()["num_plans"] == before
    own = step(rows)[0], torch.tensor(RANKS[1][:TOP_K]).expand(rows, TOP_K), weights
    assert all(answer.norm() > 0 for answer in through(rank, own)), "the next step is as if nothing had been"


@pytest.mark.parametrize("machine", ["CPU", "emulated, half cached"])
def test_loads_count_this_ranks_experts_alone(machine: str) -> None:
    rank = made(machine, RANKS[0])
    hidden, _, weights = step(2)
    ids = torch.tensor([[0, EXPERTS - 1], [0, 2]])[:, :TOP_K]
    rank.run(0, hidden, ids, weights[:, : ids.shape[1]], EngineStep())
    stats = rank.runtime.statistics()
    assert stats["hits"] + stats["misses"] == 2  # experts 0 and 2, once each


@pytest.mark.parametrize("machine", MACHINES)
def test_padding_is_not_looked_at(machine: str) -> None:
    ours, (hidden, ids, weights) = made(machine), step(3)
    wanted = through(made(), (hidden, ids, weights))
    padded = torch.cat([hidden, torch.full((5, HIDDEN), float("nan"))])
    rows = padded, torch.cat([ids, torch.full((5, TOP_K), 10**6)]), torch.cat([weights, torch.ones(5, TOP_K)])
    for found, right in zip(through(ours, rows, EngineStep(num_tokens=3)), wanted, strict=True):
        torch.testing.assert_close(found[:3], right, rtol=1e-5, atol=1e-5)
        assert torch.equal(found[3:], torch.zeros(5, HIDDEN))


def test_trials_compute_and_teach_nothing() -> None:
    ours = made("emulated, half cached")
    before = ours.runtime.statistics()
    for answer in through(ours, step(4), EngineStep(is_trial=True)):
        assert not answer.any()
    assert ours.runtime.statistics() == before


def test_many_requests_next_tokens_are_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, seen = made("emulated, half cached"), []
    plan = ours.runtime.coordinator.plan
    monkeypatch.setattr(
        ours.runtime.coordinator, "plan", lambda routing: seen.append(routing.is_decode) or plan(routing)
    )
    for phase in ("decode", "prefill"):
        ours.run(0, *step(4), EngineStep(phase=phase))
    assert seen == [True, False]


def test_gates_of_a_rank_guess_its_own_experts() -> None:
    """What is prefetched is right: one rank's numbers, though routers name all ranks' experts."""
    ours = made("emulated, half cached", RANKS[1], prefetch_size=2, profile="default")
    for seed in range(12):
        hidden = step(1, seed)[0]
        for layer in range(LAYERS):
            logits, ids = Scored(layer)(hidden)
            ours.note_logits(logits)
            ours.run(layer, hidden, ids, torch.ones(1, TOP_K), EngineStep())
    stats = ours.runtime.statistics()
    assert stats["hits"] > 0
    assert stats["num_prefetches"] > 0
    assert stats["predicted_right"] > 0
    assert ours.runtime.health().is_clean


def test_routers_that_cannot_be_asked_ahead_cost_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that are told by the model, just before, what to choose."""
    asked: list[int] = []

    class Stateful(Scored):
        def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append(1)
            raise AssertionError("asked out of turn")

    wanted = through(made(), step(2))
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.Scored", Stateful)
        ours = made("emulated, half cached")
    for _ in range(3):
        for found, right in zip(through(ours, step(2)), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(asked) == LAYERS - 1, "each layer's once"


class Faulty(TorchReferenceCpu):
    """Fails when told to."""

    fault: Exception | None = None

    def submit(self, layer: int, routed: Routed) -> None:
        if self.fault is not None and layer == 1:
            fault, self.fault = self.fault, None
            raise fault
        super().submit(layer, routed)


def faulty(monkeypatch: pytest.MonkeyPatch, machine: str) -> tuple[EngineExperts, Faulty]:
    backend = Faulty(1, CHUNK)
    monkeypatch.setattr(engine_experts, "assemble", lambda experts: assemble(experts, cpu=backend))
    return made(machine), backend


@pytest.mark.parametrize("machine", ["CPU", "emulated, none cached"])
@pytest.mark.parametrize("fault", [KernelError("injected"), RuntimeError("injected"), ValueError("injected")])
def test_a_step_that_fails_is_lost_and_the_next_is_not(
    monkeypatch: pytest.MonkeyPatch, machine: str, fault: Exception
) -> None:
    ours, backend = faulty(monkeypatch, machine)
    wanted, inputs = through(made(), step(3)), step(3)
    backend.fault = fault
    lost = through(ours, inputs)
    assert ours.take_failure() is fault
    assert ours.take_failure() is None, "told once"
    assert lost[-1].isnan().all(), "whoever samples has to see it"
    assert not any(answer.isnan().any() for answer in lost[:-1]), "keys and values stay numbers"
    for found, right in zip(through(ours, inputs), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_a_dead_backend_is_the_engines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never comes back, and so neither would any request's answer."""
    ours, backend = faulty(monkeypatch, "CPU")
    backend.fault = DeadlineError("has not come back")
    with pytest.raises(DeadlineError):
        through(ours, step(2))


def test_states_that_are_not_finite_lose_their_step() -> None:
    ours, (hidden, ids, weights) = made(), step(2)
    hidden[1, 3] = float("inf")
    assert through(ours, (hidden, ids, weights))[-1].isnan().all()
    assert not through(ours, step(2))[-1].isnan().any()
