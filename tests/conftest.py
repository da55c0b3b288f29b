"""What every test shares: hidden devices or none, Triton's interpreter, one torch thread, models written once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.support import interpreter

if TYPE_CHECKING:
    from tests.support.generated_model import GeneratedModel, Shape

_HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "ONEAPI_DEVICE_SELECTOR": "*:cpu"}
"""What keeps a process, and those it starts, from seeing CUDA, HIP and XPU devices."""


class _Marks:
    """Names in a marker expression, as an item with at most one mark sees them."""

    def __init__(self, mark: str) -> None:
        self._mark = mark

    def __getitem__(self, name: str) -> bool:
        return name == self._mark


def is_for_devices(expression: str) -> bool:
    """Whether a run's `-m` takes the tests that need a device, and leaves those without a mark."""
    try:
        takes = [bool(eval(expression or "True", {"__builtins__": {}}, _Marks(mark))) for mark in ("gpu", "")]
    except Exception:  # pytest itself will say what is wrong with it
        return False
    return takes == [True, False]


def pytest_configure(config: pytest.Config) -> None:
    """Ordinary runs are the same on every machine: no device is seen, kernels run in Triton's interpreter."""
    if not is_for_devices(config.getoption("markexpr", "")):
        os.environ.update(_HIDDEN)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any of ours is imported
        interpreter.mend()


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """A run for devices that finds none says so, instead of spending minutes in the interpreter."""
    if is_for_devices(config.getoption("markexpr", "")) and not (torch.cuda.is_available() or torch.xpu.is_available()):
        missing = pytest.mark.skip(reason="torch sees no CUDA, HIP or XPU device on this machine")
        for item in items:
            item.add_marker(missing)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_notes_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Failures that tests inject are nothing that the user's `hybrimoe doctor` should tell of."""
    from hybrimoe_kt.host import last_runs

    file = tmp_path_factory.mktemp("cache") / "last-runs.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_runs, "state_path", lambda: file)
        yield


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], GeneratedModel]:
    """Return a function that writes a random model of a shape once and remembers it."""
    from tests.support.generated_model import generate

    models: dict[Shape, GeneratedModel] = {}

    def make(shape: Shape) -> GeneratedModel:
        if shape not in models:
            folder = tmp_path_factory.mktemp("model")
            models[shape] = generate(shape, folder / f"{shape.architecture}.gguf")
        return models[shape]

    return make


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    from hybrimoe_kt import models

    return models.embedded_model()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    from hybrimoe_kt import models

    return models.tiny_model()
