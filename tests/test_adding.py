"""What docs/development.md says of adding things, done: each takes one place, and everything else knows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hybrimoe_kt import accelerators
from hybrimoe_kt.accelerators import Kind
from hybrimoe_kt.backends import registry
from hybrimoe_kt.backends.gpu_torch import TorchReferenceGpu
from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu, expert_ffn
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.core.policies import POLICIES, Policy
from hybrimoe_kt.core.types import Routing
from hybrimoe_kt.device.backend import CpuBackend, GpuBackend, Routed
from hybrimoe_kt.device.emulated.journal import JournalAccelerator
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.layout import SlotLayout
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.quants import TYPES, Plane, QuantType

# A quantisation type: blocks of 32 values in 20 bytes, a half and a pad before 16 low and then 16 high nibbles.
MADE_UP = QuantType(
    "Q4_X", 99, 32, 20, (Plane("qs", 4, 16), Plane("d", 0, 2), Plane("pad", 2, 2)),
    dequantize=f"{__name__}:dequantize_made_up",
)  # fmt: skip
EXPERTS, TOP_K, HIDDEN, INTER = 3, 2, 64, 32


def dequantize_made_up(blocks: torch.Tensor) -> torch.Tensor:
    scale = blocks[:, :2].contiguous().view(torch.float16).to(torch.float32)
    return scale * (torch.cat((blocks[:, 4:] & 0xF, blocks[:, 4:] >> 4), dim=1).to(torch.float32) - 8)


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> LayerExperts:
    monkeypatch.setitem(TYPES, MADE_UP.number, MADE_UP)
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> ExpertMatrix:
        blocks = random.integers(0, 256, (EXPERTS, rows * columns // 32, 20), dtype=np.uint8)
        blocks[:, :, :2] = np.full(1, 0.01, np.float16).view(np.uint8)
        return ExpertMatrix(torch.from_numpy(blocks.reshape(EXPERTS, -1)), MADE_UP.number, rows, columns)

    wide = matrix(INTER, HIDDEN), matrix(INTER, HIDDEN)
    return LayerExperts(0, EXPERTS, TOP_K, HIDDEN, INTER, *wide, matrix(HIDDEN, INTER))


def test_a_type_has_a_layout(experts: LayerExperts) -> None:
    layout = SlotLayout(experts)
    assert [segment.plane.name for segment in layout.segments] == ["qs", "d", "pad"] * 3
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    layout.write(experts.parts(1), slot)
    for matrix, part in zip(layout.matrices, experts.parts(1), strict=True):
        assert torch.equal(matrix.read(slot), part)
        assert matrix.type is MADE_UP


def test_a_type_is_computed_by_the_reference(experts: LayerExperts) -> None:
    """On both sides, to the same bits, which are those of the matrices it stands for."""
    layout, cpu, gpu = SlotLayout(experts), TorchReferenceCpu(), TorchReferenceGpu()
    memory = torch.zeros(EXPERTS, layout.slot_bytes, dtype=torch.uint8)
    for index in range(EXPERTS):
        layout.write(experts.parts(index), memory[index])
    cpu.add_layer(experts)
    gpu.add_layer(experts, layout, memory)
    hidden, weights = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0)), torch.rand(4, TOP_K)
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [0, -1]])
    cpu.submit(0, Routed(hidden, ids, weights))
    out = torch.zeros(4, TOP_K, HIDDEN)
    gpu.launch(0, [(i, i) for i in range(EXPERTS)], torch.arange(EXPERTS), Routed(hidden, ids, weights), out)
    assert torch.equal(cpu.wait(), out)
    shapes = zip(experts.parts(2), experts.matrices, strict=True)
    matrices = [dequantize_made_up(part.view(-1, 20)).view(matrix.rows, matrix.columns) for part, matrix in shapes]
    wanted = expert_ffn(hidden[1:3], *matrices) * torch.stack((weights[1, 1], weights[2, 0]))[:, None]
    torch.testing.assert_close(torch.stack((out[1, 1], out[2, 0])), wanted)
    assert wanted.abs().max() > 0


def test_a_type_without_kernels_is_refused_by_name(experts: LayerExperts) -> None:
    assert registry.gpu_backend("triton").refuses(experts) == "gate experts are Q4_X, which no GPU kernel reads"
    assert "gate experts are Q4_X" in (registry.cpu_backend("llamafile").refuses(experts) or "")
    assert MADE_UP in registry.gpu_backend("torch").types()


class MadeUpCpu(CpuBackend):
    name = "made up"
    answers_pairs = True
    num_calls = 0

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        self._reference = TorchReferenceCpu()
        assert num_threads == 3 and max_tokens == ExpertOptions().max_chunk_tokens

    def add_layer(self, experts: LayerExperts) -> None:
        self._reference.add_layer(experts)

    def submit(self, layer: int, routed: Routed) -> None:
        MadeUpCpu.num_calls += 1
        self._reference.submit(layer, routed)

    def is_done(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self._reference.wait()


class MadeUpGpu(GpuBackend):
    name = "made up"
    answers_pairs = True
    finds_routed = True
    num_calls = 0

    def __init__(self) -> None:
        self._reference = TorchReferenceGpu()

    def add_layer(self, experts: LayerExperts, layout: SlotLayout, memory: torch.Tensor) -> None:
        self._reference.add_layer(experts, layout, memory)

    def launch(
        self, layer: int, slots: Sequence[tuple[int, int]], slot_of: torch.Tensor, routed: Routed, out: torch.Tensor
    ) -> None:
        MadeUpGpu.num_calls += 1
        self._reference.launch(layer, slots, slot_of, routed, out)


class OnlyOnXpu(MadeUpGpu):
    @classmethod
    def unusable(cls, device: torch.device) -> str | None:
        return f"it runs on xpu only, not on {device.type}"


def tokens(model: Path, **options: Any) -> list[int]:
    given = {"accelerator": "emulated", "cache_size": "50%", "profile": "default"} | options
    engine = build_engine(model, progress=False, option_overrides=given)
    prompt = engine.tokenizer("Hello", return_tensors="pt").input_ids[0].tolist()
    return list(engine.tokens(prompt, Sampling(max_new_tokens=4, temperature=0)))


@pytest.mark.parametrize("by", ["name", "place"])
def test_backends_of_ones_own_run_a_model(by: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    cpu, gpu = f"{__name__}:MadeUpCpu", f"{__name__}.MadeUpGpu"
    if by == "name":
        monkeypatch.setitem(registry.CPU_BACKENDS, "made_up", cpu)
        monkeypatch.setitem(registry.GPU_BACKENDS, "made_up", gpu)
        cpu = gpu = "made_up"
    monkeypatch.setattr(MadeUpCpu, "num_calls", 0)
    monkeypatch.setattr(MadeUpGpu, "num_calls", 0)
    found = tokens(tiny_model, cpu_backend=cpu, gpu_backend=gpu, cpu_threads=3)
    assert MadeUpCpu.num_calls > 0 < MadeUpGpu.num_calls
    assert found == tokens(tiny_model, cpu_backend="torch_reference", gpu_backend="torch_reference")


def test_a_backend_that_cannot_run_here_says_so(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="it runs on xpu only, not on cpu; or give auto"):
        tokens(tiny_model, cpu_backend="torch_reference", gpu_backend=f"{__name__}:OnlyOnXpu")


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(ConfigError, match=r"unknown cpu_backend 'llamafiel', did you mean 'llamafile'\?"):
        ExpertOptions(cpu_backend="llamafiel")
    with pytest.raises(ConfigError, match=r"unknown gpu_backend 'torch-reference', did you mean 'torch_reference'\?"):
        ExpertOptions(gpu_backend="torch-reference")
    for name in ("nowhere.at_all:Cpu", f"{__name__}:NoSuchClass"):
        with pytest.raises(ConfigError, match=f"cpu_backend '{name}' cannot be loaded"):
            registry.cpu_backend(ExpertOptions(cpu_backend=name).cpu_backend)
    with pytest.raises(ConfigError, match=r"is no CpuBackend, it has no .*submit.*let it inherit from"):
        registry.cpu_backend("collections:OrderedDict")
    with pytest.raises(ConfigError, match=r"is no GpuBackend, it has no .*add_layer, launch"):
        registry.gpu_backend("hybrimoe_kt.device.backend:GpuBackend")


class FewestFirst(Policy):
    """A policy of one's own: the expert of the highest number goes last, times an option."""

    name = "fewest_first"
    options = {"factor": 1.0}  # noqa: RUF012

    def touch(self, routing: Routing) -> None:
        """Learn nothing."""

    def value(self, expert: int) -> float:
        return expert * float(self.option["factor"])


class Forgetful(Policy):
    """Lacks the half of what a policy is."""

    def touch(self, routing: Routing) -> None:
        """Learn nothing."""


@pytest.mark.parametrize("by", ["name", "place"])
def test_a_policy_of_ones_own_runs_a_model(by: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    policy = FewestFirst.name
    if by == "name":
        monkeypatch.setitem(POLICIES, policy, FewestFirst)  # type: ignore[misc]
    else:
        policy = f"{__name__}:FewestFirst"
    options = {"policy": policy, "policy_options": {"factor": 2.0}, "accelerator": "emulated", "cache_size": "25%"}
    engine = build_engine(tiny_model, progress=False, option_overrides=options | {"cpu_backend": "torch_reference"})
    engine.complete("Once", sampling=Sampling(max_new_tokens=3, temperature=0))
    assert engine.runtime.coordinator.stats.num_plans > 0
    assert engine.runtime.options.strategy.policy == policy
    with pytest.raises(ConfigError, match="unknown option 'facter', did you mean 'factor'"):
        ExpertOptions(policy=policy, policy_options={"facter": 2.0})


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("fewest", "unknown policy 'fewest'"),
        ("no.such.module:Policy", "cannot be imported"),
        (f"{__name__}:MADE_UP", "is not a subclass of hybrimoe_kt.core.policies.base.Policy"),
        (f"{__name__}:Forgetful", "lacks value, see hybrimoe_kt.core.policies.base.Policy"),
    ],
)
def test_a_policy_that_is_none_is_one_sentence(policy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpertOptions(policy=policy)


class MadeUpAccelerator(JournalAccelerator):
    """One of one's own, of a kind that the table does not know."""

    @classmethod
    def named(cls, name: str, colour: str | None) -> MadeUpAccelerator:
        made = cls(name)
        made.colour = colour
        return made

    colour: str | None = None


def test_an_accelerator_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="unknown accelerator 'painted:red'"):
        ExpertOptions(accelerator="painted:red")
    kind = Kind("painted[:COLOUR]", r"painted(?::(\w+))?", f"{__name__}:MadeUpAccelerator.named")
    monkeypatch.setattr(accelerators, "ACCELERATORS", [*accelerators.ACCELERATORS, kind])
    options = {"accelerator": "painted:red", "cache_size": "50%", "cpu_backend": "torch_reference"}
    engine = build_engine(tiny_model, progress=False, option_overrides=options)
    engine.complete("Once", sampling=Sampling(max_new_tokens=3, temperature=0))
    (accelerator,) = engine.runtime.accelerators
    assert isinstance(accelerator, MadeUpAccelerator) and accelerator.colour == "red"
    assert "experts" in accelerator.sites, "it computed nothing"
    with pytest.raises(ConfigError, match=r"valid: .*painted\[:COLOUR\]"):
        ExpertOptions(accelerator="paintd")


@pytest.mark.parametrize(
    ("name", "meant"), [("gpu", "cuda"), ("CUDA", "cuda"), ("cpu", "none"), ("emulatd", "emulated")]
)
def test_what_people_write_for_an_accelerator_is_understood(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        ExpertOptions(accelerator=name)


def test_a_backend_that_is_none_is_refused_with_the_options() -> None:
    """Before any model is loaded, by the rules command too."""
    with pytest.raises(ConfigError, match=r"is no CpuBackend, it has no .*answers_pairs"):
        ExpertOptions(cpu_backend=f"{__name__}:FewestFirst")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ExpertOptions(gpu_backend="no.such.module:Backend")
