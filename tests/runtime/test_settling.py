"""What of a captured step can wait: where the CPU has no share, one looks ahead with the next piece under way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.types import Plan
from hybrimoe_kt.device.emulated.journal import JournalAccelerator, JournalCpu
from hybrimoe_kt.device.lane import Lane
from hybrimoe_kt.device.readback import Readback
from hybrimoe_kt.device.recorder import Recorder
from hybrimoe_kt.device.sent_routing import SentRouting
from hybrimoe_kt.device.step_graph import StepLost
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble
from hybrimoe_kt.runtime.step_pieces import StepPieces
from tests.device.machine import CHUNK, EXPERTS, HIDDEN, LAYERS, TOP_K, layers, wanted


class Gates:
    """Guesses of the next layer, another one each time."""

    num_experts = EXPERTS

    def __init__(self, layer: int) -> None:
        self.layers = (layer + 1,)
        self._generator = torch.Generator().manual_seed(layer)

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        ids[0].copy_(torch.rand(1, EXPERTS, generator=self._generator).argsort(dim=1)[:, :TOP_K])
        scores.fill_(1 / EXPERTS)


class Machine:
    """A runtime, what its accelerator was given, and its layers' routing as captured steps send it."""

    def __init__(self, **given: Any) -> None:
        self.accelerator = JournalAccelerator()
        self.plans: list[Plan] = []
        options = {
            "accelerator": "emulated", "profile": "default", "cache_size": 4, "max_chunk_tokens": CHUNK,
            "scheduler": "gpu_only", "prefetch_size": 2,
        }  # fmt: skip
        experts = ModelExperts(ExpertOptions.from_kwargs(options | given))
        for layer in layers():
            experts.add(layer)
        self.runtime: Runtime = assemble(
            experts,
            cpu=JournalCpu(TorchReferenceCpu(), self.accelerator),
            accelerators={"emulated": self.accelerator},
            on_plan=lambda plan, routing: self.plans.append(plan),
        )
        for layer in range(LAYERS - 1):
            self.runtime.look_ahead(layer, Gates(layer))
        self._number = torch.zeros(1, dtype=torch.int64)
        self._sent: dict[int, SentRouting] = {}
        self._answer = torch.empty(1, HIDDEN)
        self.accelerator.entries.clear()

    def sent(self, layer: int, routed: Routed) -> SentRouting:
        if layer not in self._sent:
            self._sent[layer] = self.runtime.lanes[0].readback.sending(routed, None, self._number)
        sent = self._sent[layer]
        sent.send(routed, None, Recorder())
        return sent

    def step(self, layer: int, routed: Routed) -> None:
        """Begin and finish one; what can wait does."""
        sent = self.sent(layer, routed)
        answer = self.runtime.finish(self.runtime.begin(layer, sent.routed, sent), self._answer)
        assert torch.equal(answer, wanted(layer, (routed.hidden, routed.ids, routed.weights)))


def routed(seed: int) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(1, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return Routed(torch.randn(1, HIDDEN, generator=generator), ids, torch.rand(1, TOP_K, generator=generator))


@pytest.mark.parametrize("scheduler", ["gpu_only", "balanced", "cpu_only"])
def test_waiting_changes_no_decision(scheduler: str) -> None:
    eager, waiting = Machine(scheduler=scheduler), Machine(scheduler=scheduler)
    for number in range(20 * LAYERS):
        layer, step = number % LAYERS, routed(number)
        eager.runtime.run(layer, step)
        waiting.step(layer, step)
        waiting.runtime.settle()
        waiting.runtime.settle()  # again: nothing
    assert waiting.plans == eager.plans
    assert waiting.runtime.statistics() == eager.runtime.statistics()
    if scheduler != "cpu_only":
        assert waiting.runtime.statistics()["num_prefetches"] > 0
    waiting.runtime.coordinator.check_integrity()


def test_gates_are_asked_when_it_is_settled() -> None:
    machine = Machine()
    machine.step(0, routed(1))
    assert not machine.plans[-1].cpu
    assert "gates" not in machine.accelerator.sites and "join" in machine.accelerator.sites
    machine.runtime.settle()
    assert "gates" in machine.accelerator.sites


def test_beside_a_share_of_the_cpu_nothing_waits() -> None:
    machine = Machine(scheduler="static")
    machine.step(0, routed(1))
    assert machine.plans[-1].cpu, "this step is no hybrid one"
    sites = machine.accelerator.sites
    kinds = [entry.kind for entry in machine.accelerator.entries]
    assert kinds.index("submit") < sites.index("gates") < kinds.index("done")


def test_a_step_that_nobody_settles_is_learnt_from_all_the_same() -> None:
    machine = Machine()
    for number in range(3 * LAYERS):
        machine.step(number % LAYERS, routed(number))
    machine.runtime.run(0, routed(100))
    assert machine.runtime.statistics()["num_plans"] == 3 * LAYERS + 1
    machine.runtime.coordinator.check_integrity()


def test_room_is_made_before_it_is_settled() -> None:
    machine = Machine()
    machine.step(0, routed(1))
    assert machine.runtime.make_room(torch.OutOfMemoryError("injected"))
    machine.runtime.settle()
    machine.runtime.coordinator.check_integrity()
    machine.runtime.run(0, routed(2))


def test_gates_that_fail_lose_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host had gone on: nobody knows what of it is right."""
    machine = Machine()
    monkeypatch.setattr(Lane, "note_failure", lambda lane: False)
    machine.step(0, routed(1))

    def fail(*_: Any) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Readback, "ask", fail)
        with pytest.raises(StepLost, match="injected"):
            machine.runtime.settle()
    machine.runtime.coordinator.check_integrity()
    assert machine.runtime.health().accelerators["emulated"].failed_steps == 1
    machine.step(0, routed(2))
    machine.runtime.settle()


def test_a_piece_is_under_way_when_the_layer_before_it_is_settled() -> None:
    """And the last layer's, when the last piece is."""
    machine = Machine()
    pieces = StepPieces(machine.runtime, machine.accelerator)
    given = [routed(layer) for layer in range(LAYERS)]

    def model() -> None:
        for layer in range(LAYERS):
            pieces.finish(pieces.begin(layer, given[layer]))

    model()
    pieces.begin_capture()
    model()
    pieces.end_capture()
    for _ in range(3):  # launches within a layer are captured by now
        machine.accelerator.entries.clear()
        pieces.replay()
    order = [site for site in machine.accelerator.sites if site in ("piece", "gates")]
    assert order == ["piece", *["piece", "gates"] * (LAYERS - 1), "piece"]


class Right(Gates):
    """Guesses what the next layer of this step is given."""

    def __init__(self, layer: int, given: list[Routed]) -> None:
        super().__init__(layer)
        self._given = given

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        ids[0].copy_(self._given[self.layers[0]].ids)
        scores.fill_(1 / EXPERTS)


class Steps:
    """Captured steps of a machine whose layers are given other routings each time."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.given = machine, [routed(layer) for layer in range(LAYERS)]
        self.pieces = StepPieces(machine.runtime, machine.accelerator)
        self.answers: list[torch.Tensor] = []

    def model(self) -> None:
        self.answers = [self.pieces.finish(self.pieces.begin(layer, self.given[layer])) for layer in range(LAYERS)]

    def capture(self) -> None:
        self.pieces.begin_capture()
        self.model()
        self.pieces.end_capture()

    def replay(self, seed: int) -> None:
        for layer, kept in enumerate(self.given):
            for target, source in zip(kept[:3], routed(100 * seed + layer)[:3], strict=True):
                target.copy_(source)
        self.pieces.replay()


def test_prefetches_are_under_way_before_the_layer_that_they_are_for_is_known() -> None:
    machine = Machine()
    steps = Steps(machine)
    for layer in range(LAYERS - 1):
        machine.runtime.look_ahead(layer, Right(layer, steps.given))
    steps.model()
    steps.capture()
    num_ahead = 0
    for seed in range(1, 40):
        machine.accelerator.entries.clear()
        steps.replay(seed)
        sites = [entry.site for entry in machine.accelerator.entries]
        for at, site in enumerate(sites):
            if site == "gates":
                rest = sites[at:]
                num_ahead += "expert copy" in rest[: rest.index("slot tables to device")]
    assert num_ahead >= 3


def test_a_step_is_lost_where_a_failure_takes_slots_that_its_rest_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(cache_size=EXPERTS, prefetch_size=0)
    runtime, steps = machine.runtime, Steps(machine)
    runtime._on_plan = None  # whole layers are passed over
    coordinator = runtime.coordinator

    def lose() -> None:
        """An expert of layer 0, as after a failure in a prompt."""
        coordinator.drop(0, coordinator.slots_of(0)[int(steps.given[0].ids[0, 0])])

    lose()
    steps.model()
    lose()
    steps.capture()
    assert [list(piece.whole) for piece in steps.pieces._pieces] == [[], [1, 2]]
    lose()
    assert steps.pieces.is_valid()

    def fail(transfer: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.lanes[0].queue, "start", fail)
        with pytest.raises(StepLost, match="slots are gone"):
            steps.pieces.replay()
    assert runtime.health().accelerators["emulated"].shrunk == 1
    coordinator.check_integrity()
    assert not steps.pieces.is_valid()
