"""Page-locking in place: one table a process; whole pages, its own or a file's; given back before the memory goes."""

from __future__ import annotations

import gc
import mmap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrimoe_kt.device import page_locks, torch_accelerator
from hybrimoe_kt.device.host_store import HostStore
from hybrimoe_kt.device.page_locks import PAGE, PageLocks, _without, fresh_pages
from hybrimoe_kt.device.torch_accelerator import TorchAccelerator

from .machine import layers


class StandIn:
    """Behaves as CUDA's driver does: a page locked twice is an error, and so is unlocking what is not locked."""

    def __init__(self, most_bytes: int = 2**62) -> None:
        self.locked: dict[int, int] = {}
        self.most_bytes = most_bytes
        self.calls = self.settled = 0

    def lock(self, address: int, num_bytes: int, *, read_only: bool) -> bool:
        self.calls += 1
        assert address % PAGE == 0 and num_bytes % PAGE == 0
        overlaps = any(begin < address + num_bytes and address < begin + size for begin, size in self.locked.items())
        if overlaps or sum(self.locked.values()) + num_bytes > self.most_bytes:
            return False
        self.locked[address] = num_bytes
        return True

    def unlock(self, address: int) -> None:
        assert self.settled, "copies may be under way"
        del self.locked[address]

    def settle(self) -> None:
        self.settled += 1

    @property
    def num_bytes(self) -> int:
        return sum(self.locked.values())


@pytest.fixture
def driver() -> StandIn:
    return StandIn()


@pytest.fixture
def mapping(tmp_path: Path) -> torch.Tensor:
    """A file of ten and a half pages, mapped as models are."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(10 * PAGE + PAGE // 2))
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is not writable
        return torch.from_numpy(np.frombuffer(mapped, dtype=np.uint8))


def test_memory_is_locked_and_given_back(driver: StandIn, mapping: torch.Tensor) -> None:
    table = PageLocks()
    lock = table.hold(driver, mapping[100 : 3 * PAGE])
    assert lock is not None and driver.num_bytes == table.num_bytes == 3 * PAGE
    lock.release()
    lock.release()
    assert driver.num_bytes == table.num_bytes == 0


def test_tensors_that_share_a_page_lock_it_once(driver: StandIn, mapping: torch.Tensor) -> None:
    table = PageLocks()
    locks = [table.hold(driver, part) for part in mapping.split(5000)]
    assert None not in locks
    assert driver.num_bytes == 11 * PAGE
    for lock in locks[:-1]:
        lock.release()
    assert table.num_bytes == driver.num_bytes >= PAGE, "the last tensor's pages are still held"
    locks[-1].release()
    assert not driver.locked


def test_a_second_runtime_and_a_second_accelerator_share_what_is_locked(mapping: torch.Tensor) -> None:
    table, one, other = PageLocks(), StandIn(), StandIn()
    first, second = table.hold(one, mapping), table.hold(other, mapping)
    assert first is not None and second is not None, "the second is served too"
    assert one.calls == 1 and other.calls == 0, "locked once, for every device"
    first.release()
    assert one.locked, "somebody still copies from it"
    second.release()
    assert other.settled and not one.locked


def test_what_is_forgotten_is_given_back(driver: StandIn, mapping: torch.Tensor) -> None:
    table = PageLocks()
    lock = table.hold(driver, mapping)
    assert driver.locked
    del lock
    gc.collect()
    assert not driver.locked


def test_memory_outlives_its_lock(driver: StandIn) -> None:
    """Freed while locked, an address would be read from the old pages by whoever gets it next."""
    table = PageLocks()
    memory = fresh_pages(4 * PAGE)
    assert memory is not None
    address, lock = memory.data_ptr(), table.hold(driver, memory)
    del memory
    gc.collect()
    assert driver.locked == {address: 4 * PAGE}
    again = fresh_pages(4 * PAGE)
    assert again is not None and again.data_ptr() != address, "the locked memory has not been freed"
    assert lock is not None
    lock.release()
    assert not driver.locked


def test_fresh_memory_lives_and_dies_with_its_lock(driver: StandIn) -> None:
    table = PageLocks()
    memory = fresh_pages(3 * PAGE + 5, lambda pages: table.hold(driver, pages, read_only=False))
    assert memory is not None and memory.numel() == 3 * PAGE + 5
    view = memory.view(-1)[PAGE:]
    address = memory.data_ptr()
    del memory
    gc.collect()
    assert driver.locked == {address: 4 * PAGE}, "a view keeps it"
    view.fill_(3)
    del view
    gc.collect()
    assert not driver.locked and table.num_bytes == 0


def test_a_refusal_leaves_nothing_behind(mapping: torch.Tensor) -> None:
    """Half of a range may be locked already, and the driver refuse the rest."""
    table, driver = PageLocks(), StandIn(most_bytes=6 * PAGE)
    driver.settle()
    middle = table.hold(driver, mapping[4 * PAGE : 6 * PAGE])
    assert middle is not None
    assert table.hold(driver, mapping) is None, "four pages before fit, the five behind do not"
    assert driver.num_bytes == table.num_bytes == 2 * PAGE
    middle.release()
    assert not driver.locked


def test_pages_that_somebody_else_has_locked_are_refused(driver: StandIn, mapping: torch.Tensor) -> None:
    driver.lock(mapping.data_ptr() + 2 * PAGE, PAGE, read_only=True)
    table = PageLocks()
    assert table.hold(driver, mapping) is None
    assert driver.num_bytes == PAGE and table.num_bytes == 0


def test_nothing_is_rounded_outwards_but_in_a_file(driver: StandIn) -> None:
    """Around a tensor on the heap lie strangers' bytes."""
    table = PageLocks()
    heap = torch.zeros(5 * PAGE + 100, dtype=torch.uint8)
    assert table.hold(driver, heap[8:]) is None and not driver.calls
    own = fresh_pages(2 * PAGE)
    assert own is not None
    assert table.hold(driver, own[:-1]) is None and not driver.calls
    assert table.hold(driver, own) is not None


def test_a_hole_in_a_mapping_is_no_file(driver: StandIn, mapping: torch.Tensor) -> None:
    """Past the end of the file's mapping something else may begin."""
    end = (mapping.data_ptr() + mapping.numel()) // PAGE + 1
    assert page_locks._is_file(range(end - 2, end))
    assert not page_locks._is_file(range(end - 2, end + 4096))


@pytest.mark.parametrize(
    ("pages", "taken", "left"),
    [
        (range(0, 4), [], [range(0, 4)]),
        (range(0, 4), [range(4, 9)], [range(0, 4)]),
        (range(3, 6), [range(0, 4)], [range(4, 6)]),
        (range(0, 9), [range(2, 4), range(6, 7)], [range(0, 2), range(4, 6), range(7, 9)]),
        (range(2, 4), [range(0, 9)], []),
    ],
)
def test_only_what_is_missing_is_locked(pages: range, taken: list[range], left: list[range]) -> None:
    assert list(_without(pages, taken)) == left


def test_a_store_gives_back_what_it_has_registered(monkeypatch: pytest.MonkeyPatch, driver: StandIn) -> None:
    """One after the other or at the same time: each runtime's store copies directly, the last one unlocks."""
    table = PageLocks(is_file=lambda pages: True)
    monkeypatch.setattr(torch_accelerator, "LOCKS", table)
    monkeypatch.setattr(torch_accelerator, "CudaDriver", lambda device: driver)
    accelerator = object.__new__(TorchAccelerator)
    accelerator.device = torch.device("cuda", 0)

    def store() -> HostStore:
        made = HostStore()
        for experts in layers():
            made.add(experts)
        assert made.register(accelerator, list(made.layers)), "a later runtime is refused"
        assert all(made.is_direct(layer) for layer in made.layers)
        return made

    one, two = store(), store()
    del one
    gc.collect()
    assert driver.locked
    three = store()
    del two, three
    gc.collect()
    assert not driver.locked and table.num_bytes == 0


def test_a_layer_refused_half_way_keeps_nothing_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = StandIn(most_bytes=2 * PAGE)
    monkeypatch.setattr(torch_accelerator, "LOCKS", PageLocks(is_file=lambda pages: True))
    monkeypatch.setattr(torch_accelerator, "CudaDriver", lambda device: driver)
    accelerator = object.__new__(TorchAccelerator)
    accelerator.device = torch.device("cuda", 0)
    store = HostStore()
    store.add(layers()[0])
    assert not store.register(accelerator, [0]) and not store.is_direct(0)
    gc.collect()
    assert not driver.locked
