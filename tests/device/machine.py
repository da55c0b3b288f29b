"""A small machine for the device layer: three layers of random experts, a runtime, and what it should answer."""

from __future__ import annotations

import functools
import mmap
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.device.emulated.adversarial import AdversarialAccelerator
from hybrimoe_kt.device.emulated.adversary import Adversary
from hybrimoe_kt.device.emulated.faults import Faults
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble
from tests.support.generated_model import Type, random_blocks

EXPERTS, TOP_K, HIDDEN, INTER, LAYERS, CHUNK = 8, 3, 32, 64, 3, 6
_TYPES = ((Type.Q8_0, Type.Q5_0), (Type.F16, Type.F16), (Type.Q4_0, Type.Q8_0))

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def layers() -> tuple[LayerExperts, ...]:
    """Three layers in formats of both kinds, file order and planes, in a file's mapping as a model's are.

    So a device may page-lock them, and pages are shared by matrices.
    """
    draw = np.random.default_rng(0)

    def drawn(kind: Type, rows: int, columns: int) -> np.ndarray:
        return random_blocks(draw, kind, EXPERTS * rows, columns).reshape(EXPERTS, -1)

    shapes = [
        (kind, rows, columns)
        for kind, down in _TYPES
        for kind, rows, columns in ((kind, INTER, HIDDEN), (kind, INTER, HIDDEN), (down, HIDDEN, INTER))
    ]
    mapped = _in_a_file([drawn(*shape) for shape in shapes])
    matrices = (
        ExpertMatrix(data, int(kind), rows, columns) for data, (kind, rows, columns) in zip(mapped, shapes, strict=True)
    )
    return tuple(
        LayerExperts(number, EXPERTS, TOP_K, HIDDEN, INTER, next(matrices), next(matrices), next(matrices))
        for number in range(LAYERS)
    )


def _in_a_file(arrays: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """The same bytes in a mapping of one file, one after the other."""
    with tempfile.TemporaryFile() as file:
        for array in arrays:
            file.write(array.tobytes())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 0
    for array in arrays:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what is not writable
            flat = torch.from_numpy(np.frombuffer(mapping, np.uint8, array.nbytes, begin))
        yield flat.view(array.shape)
        begin += array.nbytes


@functools.cache
def _reference() -> TorchReferenceCpu:
    backend = TorchReferenceCpu()
    for experts in layers():
        backend.add_layer(experts)
    return backend


def wanted(layer: int, inputs: Inputs) -> torch.Tensor:
    """What the layer answers, whoever computes it; in the runtime's chunks, as a product's rounding depends on them."""
    answers = []
    for chunk in zip(*(tensor.split(CHUNK) for tensor in inputs), strict=True):
        _reference().submit(layer, Routed(*chunk))
        answers.append(_reference().wait().sum(dim=1))
    return torch.cat(answers)


class SummingCpu(TorchReferenceCpu):
    """Answers `[num_tokens, hidden]`, always in the same buffer."""

    answers_pairs = False

    def __init__(self) -> None:
        super().__init__()
        self.answer = torch.full((CHUNK, HIDDEN), float("nan"))

    def wait(self) -> torch.Tensor:
        total = super().wait().sum(dim=1)
        return self.answer[: len(total)].copy_(total)


@dataclass
class Machine:
    """A started runtime on emulated accelerators, and the source of its inputs."""

    runtime: Runtime
    dtype: torch.dtype
    tolerance: float
    """Relative error allowed, 0 for bit-identical answers."""
    accelerators: list[Any]
    random: random.Random
    guessed: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> the routing that its gate will choose next."""

    def inputs(self, layer: int, num_tokens: int) -> Inputs:
        ids = self.guessed.pop(layer, None)
        if ids is None or len(ids) != num_tokens:
            ids = self.draw(num_tokens)
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(self.dtype)
        return hidden, ids, torch.rand(num_tokens, TOP_K, generator=generator).to(self.dtype)

    def given(self, layer: int, inputs: Inputs) -> list[torch.Tensor]:
        """The inputs as a model's own work on `compute` makes them: not there before that has run.

        Where nobody will wait for `compute` they are given ready: on a layer whose accelerator has been given up, and
        where it may stall for good, which no model survives.
        """
        own = self.accelerators[layer % len(self.accelerators)]
        is_served = self.runtime.device_of(layer) is not None
        if not isinstance(own, AdversarialAccelerator) or not is_served or own.faults.failure == "stall":
            return [tensor.to(own.device) for tensor in inputs]
        given = [torch.full_like(tensor, -1 if tensor.dtype == torch.int64 else torch.nan) for tensor in inputs]

        def work() -> None:
            for target, source in zip(given, inputs, strict=True):
                target.copy_(source)

        own.model_works(work, writes=given)
        return given

    def draw(self, num_tokens: int) -> torch.Tensor:
        return torch.tensor([self.random.sample(range(EXPERTS), TOP_K) for _ in range(num_tokens)])

    def run(self, layer: int, num_tokens: int) -> None:
        """One layer step; its answer must be the reference's."""
        inputs = self.inputs(layer, num_tokens)
        device = self.accelerators[0].device
        logits = torch.randn(num_tokens, EXPERTS).to(device)
        given = self.given(layer, inputs)
        found = self.runtime.run(layer, Routed(*given, logits))
        self.accelerators[0].on_host("inputs given back", writes=given)  # nobody may still be reading them
        assert found.dtype == self.dtype and found.device == device
        self.check(layer, found.cpu(), inputs)

    def check(self, layer: int, found: torch.Tensor, inputs: Inputs) -> None:
        expected = wanted(layer, (inputs[0].float(), inputs[1], inputs[2].float()))
        if self.tolerance == 0.0:
            assert torch.equal(found, expected), f"layer {layer} answers something else"
        else:
            error = (found.float() - expected).norm() / expected.norm()
            assert error <= self.tolerance, f"layer {layer} answers something else, {float(error):.2g} off"

    def play(self, *tokens: int) -> None:
        """Run steps of so many tokens through all layers, and check that the cache is consistent after each."""
        for num_tokens in tokens:
            for layer in range(LAYERS):
                self.run(layer, num_tokens)
                self.runtime.coordinator.check_integrity()

    @property
    def num_failures(self) -> int:
        """How often an accelerator failed and the CPU stepped in."""
        return sum(health.failed_steps for health in self.runtime.health().accelerators.values())

    @property
    def races(self) -> list[str]:
        return [str(race) for race in self.accelerators[0].adversary.detector.races]


class Gates:
    """Guesses of the next layers' routing that are right with a given probability."""

    num_experts = EXPERTS

    def __init__(self, machine: Machine, layer: int, right_guesses: float) -> None:
        self.layers = range(layer + 1, min(layer + 3, LAYERS))
        self._machine, self._right_guesses = machine, right_guesses

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor) -> None:
        assert hidden.isfinite().all(), "asked before the model had written its hidden states"
        for place, later in enumerate(self.layers):
            drawn = self._machine.draw(len(hidden))
            ids[place].copy_(drawn)
            if self._machine.random.random() < self._right_guesses:
                self._machine.guessed[later] = drawn
        scores.fill_(1 / EXPERTS)


def make(
    patch: pytest.MonkeyPatch,
    seed: int,
    *,
    num_accelerators: int = 1,
    ignore: str | None = None,
    faults: Faults | None = None,
    right_guesses: float = 0.7,
    capacity_bytes: int | None = None,
    sums: bool = False,
    accelerator: Any = None,
    **options: Any,
) -> Machine:
    """A machine whose guesses of the next layers' routing are right with the given probability.

    `sums`: bfloat16 models whose backends answer sums, the CPU's in a buffer it uses again; the GPU's is torch's unless
    `gpu_backend` names one. `accelerator`: instead of emulated ones.
    """
    adversary = Adversary(seed, ignore=ignore)
    names = [f"emulated:{number}" for number in range(num_accelerators)]
    made: Mapping[str, Any] = {
        name: AdversarialAccelerator(adversary, name, faults=faults, capacity_bytes=capacity_bytes) for name in names
    }
    if accelerator is not None:
        made = {names[0]: accelerator}
    if sums:
        options.setdefault("gpu_backend", "torch")
    defaults: dict[str, Any] = {
        "cpu_backend": "torch_reference", "profile": "default", "transfer_chunk_bytes": 4096,
        "max_chunk_tokens": CHUNK, "cache_size": 3, "prefetch_size": 3, "prefetch_depth": 2, "deadline_s": 5.0,
        "host_store": ("auto", "mapped", "page_locked")[seed % 3],
    }  # fmt: skip
    experts = ModelExperts(ExpertOptions.from_kwargs(defaults | options))
    for layer in layers():
        experts.add(layer, names[layer.layer % num_accelerators])
    runtime = assemble(experts, cpu=SummingCpu() if sums else None, accelerators=made)
    dtype, tolerance = (torch.bfloat16, 0.02) if sums else (torch.float32, 0.0)
    machine = Machine(runtime, dtype, tolerance, list(made.values()), random.Random(seed))
    for number in range(LAYERS - 1):
        runtime.look_ahead(number, Gates(machine, number, right_guesses))
    return machine
