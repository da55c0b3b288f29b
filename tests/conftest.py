"""What every test shares: one torch thread, generated models written once per session, Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any of ours is imported

from benchmarks.generated_model import GeneratedModel, Shape, generate
from hybrimoe_kt import models
from hybrimoe_kt.host import last_runs


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_notes_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Failures that tests inject are nothing that the user's `hybrimoe doctor` should tell of."""
    file = tmp_path_factory.mktemp("cache") / "last-runs.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_runs, "state_path", lambda: file)
        yield


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], GeneratedModel]:
    """Return a function that writes a random model of a shape once and remembers it."""
    models: dict[Shape, GeneratedModel] = {}

    def make(shape: Shape) -> GeneratedModel:
        if shape not in models:
            folder = tmp_path_factory.mktemp("model")
            models[shape] = generate(shape, folder / f"{shape.architecture}.gguf")
        return models[shape]

    return make


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    return models.embedded_model()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    return models.tiny_model()
