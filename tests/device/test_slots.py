"""Slots hold what was transferred, in the layout kernels read; budgets are kept to the byte."""

from __future__ import annotations

import pytest
import torch

from hybrimoe_kt.core.types import ExpertId, Transfer
from hybrimoe_kt.device.accelerator import Accelerator
from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.device.cores import default_expert_threads, dense_threads, physical_cores, spinning_threads
from hybrimoe_kt.device.emulated.immediate import ImmediateAccelerator
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.layout import ALIGNMENT_BYTES, SlotLayout
from hybrimoe_kt.device.slots import SlotPool, slots_per_layer
from hybrimoe_kt.device.staging import chunks_of
from hybrimoe_kt.device.transfers import TransferQueue
from hybrimoe_kt.device.waiting import Deadline
from hybrimoe_kt.errors import CapacityError, ConfigError, ModelError
from hybrimoe_kt.sizes import CacheSize
from tests.support.expert_layers import EXPERTS, TOP_K, layer
from tests.support.generated_model import Type

KINDS = [Type.Q8_0, Type.Q4_0, Type.Q5_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.F16]


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


def queue(accelerator: Accelerator, store: HostStore, pool: SlotPool, chunk_bytes: int = 4096) -> TransferQueue:
    return TransferQueue(accelerator, store, pool, chunk_bytes=chunk_bytes, deadline=Deadline(5.0))


def in_file_order(pool: SlotPool, layout: SlotLayout, number: int, slot: int) -> list[torch.Tensor]:
    return [matrix.read(pool.bytes_of(number, slot)) for matrix in layout.matrices]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_layout_keeps_every_byte(kind: Type) -> None:
    experts = layer(kind, down=Type.Q6_K if kind == Type.Q4_K else None)
    layout = SlotLayout(experts)
    parts = experts.parts(3)
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.write(parts, slot)
    assert all(torch.equal(m.read(slot), part) for m, part in zip(layout.matrices, parts, strict=True))
    assert all(segment.start_bytes % ALIGNMENT_BYTES == 0 for segment in layout.segments)
    assert experts.expert_bytes <= layout.slot_bytes < experts.expert_bytes + ALIGNMENT_BYTES * len(layout.segments)
    assert layout.is_file_order == (kind in (Type.Q4_K, Type.Q5_K, Type.F16) and experts.down.ggml_type == kind)


@pytest.mark.parametrize("chunk_bytes", [100, 1000, 4096, 2**20])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_chunks_cover_an_expert_once(kind: Type, chunk_bytes: int) -> None:
    experts = layer(kind)
    layout = SlotLayout(experts)
    parts = experts.parts(5)
    whole, pieces = (torch.zeros(layout.slot_bytes, dtype=torch.uint8) for _ in range(2))
    layout.write(parts, whole)
    total = 0
    for chunk in chunks_of(layout, chunk_bytes):
        num_bytes = sum(run.num_bytes for run in chunk)
        assert num_bytes <= max(chunk_bytes, 256)
        total += num_bytes
        for run in chunk:
            run.split(run.source(parts), pieces)
    assert total == experts.expert_bytes
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("source", ["staged", "page_locked", "registered"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_a_transfer_brings_the_expert(emulated: Accelerator, kind: Type, source: str) -> None:
    store = HostStore()
    store.add(layer(kind, number=1))
    if source == "page_locked":
        store.page_lock(emulated, [1])
        assert store.copied_bytes == EXPERTS * store.layouts[1].slot_bytes
    if source == "registered":
        assert store.register(emulated, [1])
    assert store.is_direct(1) == (source != "staged")
    pool = SlotPool(emulated, store.layouts, {1: 2})
    link = queue(emulated, store, pool)
    link.start(transfer(store, 1, 5, 1))
    link.enqueue(transfer(store, 1, 2, 0))
    link.pump()
    assert not link.waiting
    for slot, index in ((1, 5), (0, 2)):
        found = in_file_order(pool, store.layouts[1], 1, slot)
        assert all(torch.equal(a, b) for a, b in zip(found, store.parts(ExpertId(1, index)), strict=True))


def test_the_mapping_is_the_only_copy_until_asked(store: HostStore, emulated: Accelerator) -> None:
    """Views, not copies: changing the file's bytes changes what the store hands out."""
    assert store.copied_bytes == 0
    gate = store.layers[1].gate.data
    before = store.parts(ExpertId(1, 0))[0].clone()
    gate[0, 0] ^= 255
    assert not torch.equal(store.parts(ExpertId(1, 0))[0], before)
    gate[0, 0] ^= 255
    store.page_lock(emulated, [2])
    assert not store.is_copied(1) and store.is_copied(2)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(3, 3), (0, 0), (99, EXPERTS), ("50%", 4), ("all", EXPERTS), (0.13, 1)],
)
def test_counts_and_shares(store: HostStore, emulated: Accelerator, size: object, wanted: int) -> None:
    assert slots_per_layer(CacheSize.parse(size), store, emulated) == {1: wanted, 2: wanted}


@pytest.mark.parametrize("num_slots", [0, 1, 3, EXPERTS])
def test_a_budget_is_never_exceeded_and_never_wasted(store: HostStore, emulated: Accelerator, num_slots: int) -> None:
    one_each = sum(layout.slot_bytes for layout in store.layouts.values())
    for budget, wanted in ((num_slots * one_each, num_slots), ((num_slots + 1) * one_each - 1, num_slots)):
        slots = slots_per_layer(CacheSize(num_bytes=budget), store, emulated)
        assert slots == {1: wanted, 2: wanted}
        assert SlotPool(emulated, store.layouts, slots).num_bytes <= budget


def test_more_than_the_device_has_is_refused(
    store: HostStore, emulated: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImmediateAccelerator, "free_bytes", lambda self: 10**6)
    for size in ("2MB", 4):
        with pytest.raises(CapacityError, match="smaller cache_size"):
            slots_per_layer(CacheSize.parse(size), store, emulated)
    assert slots_per_layer(CacheSize(), store, emulated) == {1: 1, 2: 1}, "auto takes half of what is free"


def test_accelerators() -> None:
    assert choose_accelerator("none") is None
    for name in ("emulated", "emulated:3", "emulated:adversarial:7", "emulated:timed:a6000-xeon5220r"):
        accelerator = choose_accelerator(name)
        assert accelerator is not None and accelerator.name == name
    with pytest.raises(ConfigError, match="describes no GPU"):
        choose_accelerator("emulated:timed:cpu-only")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds none on this machine"):
            choose_accelerator("cuda")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        assert choose_accelerator("auto") is None


def test_threads_share_the_cores() -> None:
    cores = physical_cores()
    assert default_expert_threads() == cores  # they sleep between calls, when dense layers compute
    assert 1 <= default_expert_threads(beside_accelerator=True) <= max(1, cores - 2)
    assert spinning_threads() + dense_threads(spinning_threads()) <= max(2, cores)


def test_experts_that_contradict_their_shape() -> None:
    good = layer()
    with pytest.raises(ModelError, match="layer 0: expert gate matrices are 8 of 256x256, the configuration wants 9"):
        LayerExperts(0, EXPERTS + 1, TOP_K, good.hidden, good.inter, *good.matrices)
