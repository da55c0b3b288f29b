"""Dense weights are made where they will stand, from the file's bytes, and bit for bit as in one piece."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.device.unused_memory import give_back_unused
from hybrimoe_kt.host.hf.loading import _skeleton, _stored
from hybrimoe_kt.host.hf.placement import Placement
from hybrimoe_kt.host.hf.sources import open_source
from hybrimoe_kt.weights import lazy as lazy_tensors
from hybrimoe_kt.weights.checkpoint import Checkpoint
from hybrimoe_kt.weights.lazy import LazyTensor
from tests.support.generated_model import GeneratedModel, Shape, Type

Make = Callable[[Shape], GeneratedModel]
CPU, META = torch.device("cpu"), torch.device("meta")
# Both have parameters composed of two tensors, hybrid attention also has transforms of every kind.
HYBRID = Shape(architecture="qwen3next", head_dim=64, layers=4, dense_type=Type.Q8_0)
LATENT = Shape(architecture="deepseek2", heads=2, kv_heads=2, kv_lora_rank=64, rope_dim=32, dense_type=Type.Q4_0)


def state_of(path: Path, dtype: torch.dtype, device: torch.device) -> dict[str, LazyTensor]:
    """Every parameter that the file itself has: the routed experts are left out."""
    source = open_source(path, None)
    shapes = {name: tuple(value.shape) for name, value in _stored(_skeleton(source.config)).items()}
    dense = {name: shape for name, shape in shapes.items() if ".experts." not in name}
    return source.state(dense, dtype, lambda name: device)


class _Floats(TorchDispatchMode):
    """Notes the types of float tensors that are made on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.device == CPU:
            self.on_cpu.add(out.dtype)
        return out


@pytest.mark.parametrize("shape", [HYBRID, LATENT], ids=["transforms", "composed"])
def test_bytes_move_and_floats_are_made_there(shape: Shape, generated: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, torch.dtype]] = []
    most_parts = 0

    def recorded(data: torch.Tensor, ggml_type: int, wanted: tuple[int, ...]) -> torch.Tensor:
        given.append((data.device.type, data.dtype))
        return dequantize(data, ggml_type, wanted)

    monkeypatch.setattr(lazy_tensors, "dequantize", recorded)
    for name, lazy in state_of(generated(shape).path, torch.bfloat16, META).items():
        given.clear()
        with _Floats() as floats:
            made = lazy[...]
        assert made.device == META and tuple(made.shape) == lazy.shape and made.dtype == lazy.dtype, name
        assert set(given) == {("meta", torch.uint8)}, name
        assert not floats.on_cpu, name
        most_parts = max(most_parts, len(given))
    assert most_parts == 2  # some parameter of each is composed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [Shape(dense_type=Type.Q4_0), HYBRID, LATENT], ids=["plain", "transforms", "composed"]
)
def test_pieces_are_the_whole_bit_for_bit(
    shape: Shape, dtype: torch.dtype, generated: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = generated(shape).path
    whole = {name: lazy[...] for name, lazy in state_of(path, dtype, CPU).items()}
    longest = 0

    def recorded(data: torch.Tensor, ggml_type: int, wanted: tuple[int, ...]) -> torch.Tensor:
        nonlocal longest
        values = dequantize(data, ggml_type, wanted)
        longest = max(longest, values.numel())
        return values

    monkeypatch.setattr(lazy_tensors, "dequantize", recorded)
    monkeypatch.setattr(lazy_tensors, "_PIECE_VALUES", 1000)
    for name, lazy in state_of(path, dtype, CPU).items():
        made = lazy[...]
        assert made.dtype == whole[name].dtype and torch.equal(made, whole[name]), name
    assert 0 < longest <= 1000 < max(value.numel() for value in whole.values())


def test_a_checkpoint_is_converted_where_it_will_stand(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (lazy,) = Checkpoint(tmp_path).dense_state(torch.float32, (), lambda name: META).values()
    with _Floats() as floats:
        made = lazy[...]
    assert (made.device, made.dtype) == (META, torch.float32)
    assert floats.on_cpu == {torch.bfloat16}  # as it was read


def test_a_parameter_stands_where_its_module_was_placed() -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.1": "cuda:1", "model.layers.10": "emulated:1"}
    placement = Placement(places, "cuda:0")
    found = {
        name: str(placement.device_of(name))
        for name in (
            "model.embed_tokens.weight",
            "model.layers.1.mlp.gate.weight",
            "model.layers.10.mlp.gate.weight",
            "lm_head.weight",
        )
    }
    assert list(found.values()) == ["cpu", "cuda:1", "cpu", "cuda:0"]


def test_unused_memory_is_given_back_device_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's function is of the current device; a host has none, and the meta device no memory."""
    current: list[torch.device] = []
    emptied: list[str] = []

    @contextlib.contextmanager
    def at(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", at)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(str(current[-1])))
    give_back_unused([CPU, META, torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cuda:1")])
    assert sorted(emptied) == ["cuda:0", "cuda:1"]
