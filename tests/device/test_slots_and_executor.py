"""Slots hold what was transferred; budgets are kept; a plan that reuses a slot reads it before it is overwritten."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generated_model import Type
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu, TorchReferenceGpu
from hybrimoe_kt.config import CacheSize
from hybrimoe_kt.core.types import ExpertId, Plan, Transfer
from hybrimoe_kt.device.accelerator import Accelerator, choose_accelerator
from hybrimoe_kt.device.cores import default_expert_threads, dense_threads, physical_cores
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.host_store import HostStore, LayerExperts
from hybrimoe_kt.device.slots import SlotPool, slots_per_layer
from hybrimoe_kt.errors import CapacityError, ConfigError
from tests.backends.test_llamafile import EXPERTS, TOP_K, layer, step


@pytest.fixture
def store() -> HostStore:
    made = HostStore()
    for number in (1, 2):
        made.add(layer(Type.Q8_0, number=number))
    return made


@pytest.fixture
def emulated() -> Accelerator:
    accelerator = choose_accelerator("emulated")
    assert accelerator is not None
    return accelerator


def transfer(store: HostStore, number: int, index: int, slot: int) -> Transfer:
    return Transfer(ExpertId(number, index), slot, store.layers[number].expert_bytes)


def test_a_slot_holds_gate_up_down_in_order(store: HostStore, emulated: Accelerator) -> None:
    pool = SlotPool(emulated, store, {1: 2, 2: 0})
    pool.fill(transfer(store, 1, 5, 1))
    assert torch.equal(pool.bytes_of(1, 1), torch.cat(store.parts(ExpertId(1, 5))))
    assert pool.num_slots == 2
    assert pool.num_bytes == 2 * store.layers[1].expert_bytes


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(3, 3), (0, 0), (99, EXPERTS), ("50%", 4), ("all", EXPERTS), (0.13, 1)],
)
def test_counts_and_shares(store: HostStore, emulated: Accelerator, size: object, wanted: int) -> None:
    assert slots_per_layer(CacheSize.parse(size), store, emulated) == {1: wanted, 2: wanted}


@pytest.mark.parametrize("num_slots", [0, 1, 3, EXPERTS])
def test_a_budget_is_never_exceeded_and_never_wasted(store: HostStore, emulated: Accelerator, num_slots: int) -> None:
    one_each = sum(experts.expert_bytes for experts in store.layers.values())
    for budget, wanted in ((num_slots * one_each, num_slots), ((num_slots + 1) * one_each - 1, num_slots)):
        slots = slots_per_layer(CacheSize(num_bytes=budget), store, emulated)
        assert slots == {1: wanted, 2: wanted}
        assert SlotPool(emulated, store, slots).num_bytes <= budget


def test_more_than_the_device_has_is_refused(
    store: HostStore, emulated: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "free_bytes", lambda self: 10**6)
    for size in ("2MB", 4):
        with pytest.raises(CapacityError, match="smaller cache_size"):
            slots_per_layer(CacheSize.parse(size), store, emulated)
    assert slots_per_layer(CacheSize(), store, emulated) == {1: 1, 2: 1}, "auto takes half of what is free"


def _execute(
    store: HostStore, plan: Plan, residents: dict[int, int], emulated: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    cpu, gpu = TorchReferenceCpu(), TorchReferenceGpu()
    for experts in store.layers.values():
        cpu.add_layer(experts)
        gpu.add_layer(experts)
    pool = SlotPool(emulated, store, {1: 2, 2: 2})
    executor = Executor(cpu, gpu, pool)
    executor.transfer(tuple(transfer(store, 1, index, slot) for index, slot in residents.items()))
    inputs = step(6, skipped=0, seed=3)
    found = executor.join(plan, executor.start(plan, *inputs)).clone()
    cpu.submit(1, *inputs)
    return found, cpu.wait().sum(dim=1)


def test_every_split_of_the_work_gives_the_same_bits(store: HostStore, emulated: Accelerator) -> None:
    everyone = tuple(range(EXPERTS))
    plans = [
        (Plan(1, cpu=everyone), {}),
        (Plan(1, cpu=everyone[2:], gpu=(0, 1), slots={0: 1, 1: 0}), {0: 1, 1: 0}),
        (Plan(1, cpu=everyone[1:], gpu=(0,), slots={0: 0}, transfers=(transfer(store, 1, 0, 0),)), {}),
        (  # all experts through one slot, one after the other
            Plan(
                1,
                cpu=(),
                gpu=everyone,
                slots=dict.fromkeys(everyone, 0),
                transfers=tuple(transfer(store, 1, index, 0) for index in everyone),
            ),
            {},
        ),
    ]
    for plan, residents in plans:
        found, wanted = _execute(store, plan, residents, emulated)
        assert torch.equal(found, wanted)


def test_a_wrong_slot_shows(store: HostStore, emulated: Accelerator) -> None:
    """The equality above would notice: here expert 0's slot holds expert 7."""
    plan = Plan(1, cpu=tuple(range(1, EXPERTS)), gpu=(0,), slots={0: 0})
    found, wanted = _execute(store, plan, {7: 0}, emulated)
    assert not torch.allclose(found, wanted)


def test_accelerators() -> None:
    assert choose_accelerator("none") is None
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds none on this machine"):
            choose_accelerator("cuda")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        assert choose_accelerator("auto") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_slots_on_a_gpu_hold_the_same_bytes(store: HostStore) -> None:
    accelerator = choose_accelerator("cuda")
    assert accelerator is not None
    pool = SlotPool(accelerator, store, {1: 1, 2: 1})
    pool.fill(transfer(store, 1, 3, 0))
    assert torch.equal(pool.bytes_of(1, 0).cpu(), torch.cat(store.parts(ExpertId(1, 3))))


def test_threads_share_the_cores() -> None:
    cores = physical_cores()
    assert 1 <= default_expert_threads() <= cores
    assert default_expert_threads() + dense_threads(default_expert_threads()) <= max(2, cores)


def test_experts_that_contradict_their_shape() -> None:
    from hybrimoe_kt.errors import ModelError

    good = layer()
    with pytest.raises(ModelError, match="layer 0: expert gate matrices are 8 of 256x256, the configuration wants 9"):
        LayerExperts(0, EXPERTS + 1, TOP_K, good.hidden, good.inter, *good.matrices)
