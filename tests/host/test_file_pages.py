"""What the CPU reads in place is in memory after loading, where there is room, and never otherwise forced in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.weights import file_pages
from tests.support.generated_model import GeneratedModel, Shape, Type

Make = Callable[[Shape], GeneratedModel]
SMAPS = Path("/proc/self/smaps")
SHAPE = Shape(experts=16, inter=512)
pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="no /proc here")


def load(path: Path, **overrides: str) -> LoadedModel:
    return load_model(path, progress=False, option_overrides={"cpu_backend": "torch_reference", **overrides})


def resident_bytes(address: int) -> int:
    """Of the mapping that `address` lies in."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text()):
        begin, end = (int(number, 16) for number in block.split()[0].split("-"))
        if begin <= address < end:
            return int(re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    raise AssertionError("not mapped")


def resident_of(loaded: LoadedModel) -> int:
    return resident_bytes(loaded.runtime.store.layers[0].gate.data.data_ptr())


@pytest.fixture
def supported(generated: Make) -> None:
    matrix = load(generated(SHAPE).path).runtime.store.layers[0].gate
    if not file_pages._populate(matrix.data.data_ptr(), matrix.data.numel()):
        pytest.skip("this kernel is older than 5.14")


@pytest.mark.usefixtures("supported")
@pytest.mark.parametrize("accelerator", ["none", "emulated"])
def test_experts_are_in_memory_after_loading(generated: Make, accelerator: str) -> None:
    loaded = load(generated(SHAPE).path, accelerator=accelerator, cache_size="25%")
    assert resident_of(loaded) >= loaded.runtime.store.num_bytes > 2**20


def test_what_does_not_fit_is_read_as_it_is_used(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = load(generated(SHAPE).path).runtime.store.num_bytes
    monkeypatch.setattr(file_pages, "host_available_bytes", lambda: needed + file_pages._LEFT_BYTES - 1)
    assert resident_of(load(generated(SHAPE).path)) < needed // 4


def test_a_container_with_less_is_the_limit(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_pages, "inspect_memory", lambda: {"container_limit_bytes": 2**31})
    assert file_pages._room_bytes() <= 2**31
    assert file_pages.bring_in(load(generated(SHAPE).path).runtime.experts_read_in_place, progress=False) == 0


def test_a_kernel_that_cannot_is_no_error(generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_pages, "_POPULATE_READ", 9999)
    loaded = load(generated(SHAPE).path)
    assert file_pages.bring_in(loaded.runtime.experts_read_in_place, progress=False) == 0


def test_layers_that_the_cpu_copied_stay_out(generated: Make) -> None:
    """Widths that are no multiple of 256 are padded: nobody reads the file's pages again."""
    pytest.importorskip("kt_kernel", reason="kt-kernel is not installed")
    path = generated(Shape(experts=16, inter=384, types=(Type.Q8_0,) * 3)).path
    loaded = load(path, cpu_backend="llamafile")
    assert loaded.runtime.experts_read_in_place == []
    assert resident_of(loaded) < loaded.runtime.store.num_bytes // 4
