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


def _keep_to_own_cores() -> None:
    """Processes that pytest-xdist starts share out the cores, and what they start inherits its share.

    ggml's threads spin for one that has no core: where two processes had two threads each on two cores, a test of 4.5 s
    of a core took 22 s, and 51 s with other programs beside them.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: count] or cores)


def pytest_configure(config: pytest.Config) -> None:
    """Ordinary runs are the same on every machine: no device is seen, kernels run in Triton's interpreter."""
    _keep_to_own_cores()
    if not is_for_devices(config.getoption("markexpr", "")):
        os.environ.update(_HIDDEN)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any of ours is imported
        interpreter.mend()


SLOWEST = (
    "tests/benchmarks/test_launches.py::test_a_layer_takes_few_launches[DeepSeek-V2-Lite]",
    "tests/host/test_captured_kernels.py::test_all_kernels_are_captured[0.5-qwen3moe]",
    "tests/host/test_dense_on_accelerators.py::test_packaged_rules_for_two_cards_give_the_same_model[qwen3next]",
    "tests/host/test_dense_on_accelerators.py::test_packaged_rules_for_two_cards_give_the_same_model[deepseek3]",
    "tests/host/test_file_contents.py::test_keys_that_every_family_uses[deepseek3]",
    "tests/host/test_moe_block.py::test_an_error_between_the_doors_abandons_the_step[deepseek2-emulated:adversarial:3]",
    "tests/host/test_moe_block.py::test_every_bit_is_the_models_own[deepseek2-emulated-half]",
    "tests/host/test_moe_block.py::test_every_bit_is_the_models_own[deepseek2-old-kv_b-q_lora-yarn-none]",
    "tests/host/test_row_kernels.py::test_logits_and_tokens_are_the_stock_models[deepseek3]",
    "tests/runtime/test_runtime.py::test_an_accelerator_that_fails_changes_no_answer[gpu-llamafile]",
    "tests/runtime/test_runtime.py::test_an_accelerator_that_fails_changes_no_answer[transfer-llamafile]",
    "tests/tools/test_kernel_lab.py::test_a_bad_configuration_is_rejected",
)
"""Cases of ten seconds and more whose like is tried in the quick tests as well; with the slow ones all are."""


@pytest.hookimpl(tryfirst=True)  # before the marks are looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """A run for devices that finds none says so, instead of spending minutes in the interpreter."""
    on_device = is_for_devices(config.getoption("markexpr", ""))
    for item in items:
        if item.nodeid in SLOWEST or (item.get_closest_marker("slow_interpreted") and not on_device):
            item.add_marker(pytest.mark.slow)
    if on_device and not (torch.cuda.is_available() or torch.xpu.is_available()):
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
