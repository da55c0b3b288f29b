"""What Triton fails with is a failure like any other; a mistake of ours is not taken for one of Triton's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from hybrimoe_kt.backends.gpu_triton import TritonGpu
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.errors import KernelError
from hybrimoe_kt.kernels.layer import LayerKernels
from tests.kernels.layers import DEVICE, SlottedLayer, routed, slotted_layer
from tests.support.random_blocks import Type

pytestmark = pytest.mark.kernels


def prepared(layer: SlottedLayer) -> Callable[[], None]:
    """Return what launches one token's experts."""
    backend, inputs = TritonGpu(), routed(layer, 1)
    backend.add_layer(layer.experts, layer.layout, layer.memory)
    backend.prepare(4)
    out = torch.zeros(1, layer.experts.hidden, device=DEVICE)
    return lambda: backend.launch(layer.experts.layer, layer.slots, layer.slot_of, Routed(*inputs), out)


@pytest.mark.parametrize(
    "raised",
    [
        OutOfResources(240_000, 101_376, "shared memory"),
        PTXASError("ptxas died"),
        subprocess.CalledProcessError(1, ["gcc"]),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_triton_fails_with_is_a_failure_like_any_other(monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    """None of these is a RuntimeError; the layer above knows KernelError and lets the CPU answer."""
    layer = slotted_layer(Type.Q4_0)
    launch = prepared(layer)

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(LayerKernels, "add", fail)
    with pytest.raises(KernelError, match=rf"Triton cannot run the kernels of layer \d+: {type(raised).__name__}"):
        launch()


def test_a_mistake_of_ours_is_not_taken_for_one_of_triton_s(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = slotted_layer(Type.Q4_0)
    launch = prepared(layer)
    monkeypatch.setattr(LayerKernels, "add", lambda: None)
    with pytest.raises(TypeError):
        launch()
