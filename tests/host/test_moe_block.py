"""Shared experts between the two doors: the same bits as the model's own block, beside the CPU's share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.device.backend import CpuBackend, Routed
from hybrimoe_kt.device.emulated.journal import Entry, JournalAccelerator, JournalCpu
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.engine import Sampling
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.architectures import architecture_of
from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.host.rules.injection import packaged_rules
from hybrimoe_kt.operators.experts import HybriMoEExperts
from hybrimoe_kt.operators.moe_block import MoEBlock
from hybrimoe_kt.runtime import assemble
from hybrimoe_kt.weights.gguf_file import GgufFile
from tests.support.generated_model import DEEPSEEK_V2_LITE_LAYER, GeneratedModel, Shape, Type

from .stock import greedy, logits_of
from .test_equality import PLACES, PROMPT, SHAPES

Make = Callable[[Shape], GeneratedModel]
BLOCK = f"{MoEBlock.__module__}.{MoEBlock.__qualname__}"
RULE = {"match": {"name": r"^model\.layers\.\d+\.(mlp|block_sparse_moe)$"}, "replace": {"class": BLOCK}}
SHARED = {"qwen2moe", "glm4moe", "qwen3next", "qwen35moe", "ernie4_5-moe"} | {
    name for name in SHAPES if name.startswith("deepseek")
}


def rules(model: GeneratedModel, folder: Path, *, with_block: bool) -> Path:
    """The packaged file, its rule for the block taken out or, where it has none, put in."""
    family = architecture_of(GgufFile(model.path))
    found = yaml.safe_load(packaged_rules(family.rule_file).read_text())
    others = [rule for rule in found if rule["replace"].get("class") != BLOCK]
    file = folder / f"{'with' if with_block else 'without'}.yaml"
    file.write_text(yaml.safe_dump((found if len(found) > len(others) else [RULE, *found]) if with_block else others))
    return file


def load(model: GeneratedModel, folder: Path, *, with_block: bool = True, **options: Any) -> LoadedModel:
    dtype, made = options.pop("dtype", torch.float32), options.pop("assemble", assemble)
    return load_model(
        model.path, rules_path=rules(model, folder, with_block=with_block), progress=False, dtype=dtype, assemble=made,
        option_overrides={"cpu_backend": "torch_reference", **options},
    )  # fmt: skip


def blocks(loaded: LoadedModel) -> list[MoEBlock]:
    return [module for module in loaded.model.modules() if isinstance(module, MoEBlock)]


def shared_of(block: torch.nn.Module) -> torch.nn.Module:
    found = getattr(block, "shared_experts", None)
    return found if found is not None else block.get_submodule("shared_expert")


HYBRIDS = "qwen3next", "qwen35moe"
"""Which take a minute each."""


@pytest.mark.parametrize("place", ["none", "emulated-half"])
@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=[pytest.mark.slow] if name in HYBRIDS else []) for name in SHAPES]
)
def test_every_bit_is_the_models_own(generated: Make, tmp_path: Path, shape: str, place: str) -> None:
    model = generated(replace(SHAPES[shape], types=(Type.Q8_0,) * 3))
    plain, ours = (load(model, tmp_path, with_block=given, **PLACES[place]) for given in (False, True))
    num_layers = len(ours.runtime.store.layers)
    assert (len(blocks(plain)), len(blocks(ours))) == (0, num_layers if shape in SHARED else 0)
    assert torch.equal(logits_of(ours.model, PROMPT), logits_of(plain.model, PROMPT))
    (wanted, wanted_rows), (tokens, rows) = (greedy(loaded.model, PROMPT, 12) for loaded in (plain, ours))
    assert tokens == wanted and torch.equal(rows, wanted_rows)
    assert ours.runtime.coordinator.stats.snapshot() == plain.runtime.coordinator.stats.snapshot()


@pytest.mark.parametrize("shape", ["deepseek3", "qwen2moe", "ernie4_5-moe"])
def test_the_cache_hears_of_the_routers_logits(
    generated: Make, tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(generated(SHAPES[shape]), tmp_path, **PLACES["emulated-half"], policy="mrs")  # which reads them
    begin, noted = loaded.runtime.begin, []

    def note(layer: int, routed: Routed) -> Any:
        noted.append((layer, None if routed.logits is None else tuple(routed.logits.shape)))
        return begin(layer, routed)

    monkeypatch.setattr(loaded.runtime, "begin", note)
    logits_of(loaded.model, PROMPT)
    assert noted == [(layer, (len(PROMPT), SHAPES[shape].experts)) for layer in loaded.runtime.store.layers]


@pytest.mark.parametrize("shape", ["deepseek2", "qwen2moe", "ernie4_5-moe"])
def test_every_bit_in_bfloat16(generated: Make, tmp_path: Path, shape: str) -> None:
    model = generated(SHAPES[shape])
    plain, ours = (
        load(model, tmp_path, with_block=given, dtype=torch.bfloat16, **PLACES["emulated-half"])
        for given in (False, True)
    )
    assert torch.equal(logits_of(ours.model, PROMPT), logits_of(plain.model, PROMPT))


@pytest.mark.parametrize("shape", ["deepseek2", "deepseek3", "qwen2moe", "ernie4_5-moe"])
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_the_routed_experts_have_begun(generated: Make, tmp_path: Path, shape: str, num_tokens: int) -> None:
    """In every layer, before the shared ones run; and are waited for behind them. The model's own block does not."""
    orders = {}
    for with_block in (True, False):
        accelerator = JournalAccelerator()
        made = partial(
            assemble,
            cpu=JournalCpu(TorchReferenceCpu(), accelerator),
            accelerators={"emulated": accelerator},
        )
        options = {"accelerator": "emulated", "scheduler": "static", "cache_size": 4, "prefetch_size": 0}
        loaded = load(generated(SHAPES[shape]), tmp_path, with_block=with_block, assemble=made, **options)
        experts = [module for module in loaded.model.modules() if isinstance(module, HybriMoEExperts)]
        parents = [module for module in loaded.model.modules() if any(c in experts for c in module.children())]
        for parent in {id(shared_of(module)): shared_of(module) for module in parents}.values():
            parent.register_forward_pre_hook(
                lambda *_, journal=accelerator: journal.entries.append(Entry("model", "shared", 0, "launch"))
            )
        for seed in range(30):  # as long as it takes until both sides are asked
            accelerator.entries.clear()
            logits_of(loaded.model, [(seed * 31 + 7 * at) % 250 for at in range(num_tokens)])
            kinds = [
                "shared" if entry.site == "shared" else entry.kind
                for entry in accelerator.entries
                if entry.site in ("CPU experts", "experts", "shared")
            ]
            if kinds.count("submit") == kinds.count("launch") == len(experts):
                break
        orders[with_block] = kinds
        num_layers = len(experts)
    assert orders[True] == ["submit", "launch", "shared", "done"] * num_layers
    assert orders[False] in (
        ["submit", "launch", "done", "shared"] * num_layers,
        ["shared", "submit", "launch", "done"] * num_layers,
    )


class Failing:
    """Makes a module fail at one call of it."""

    def __init__(self, module: torch.nn.Module, call: int) -> None:
        self.call, self.count = call, 0
        module.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.call:
            raise RuntimeError("injected between the doors")


@pytest.mark.parametrize("accelerator", ["none", "emulated", "emulated:adversarial:3"])
@pytest.mark.parametrize("shape", ["deepseek2", "qwen2moe"])
def test_an_error_between_the_doors_abandons_the_step(
    generated: Make, tmp_path: Path, shape: str, accelerator: str
) -> None:
    model = generated(SHAPES[shape])
    options = {"accelerator": accelerator, "cache_size": 3, "prefetch_size": 2}
    if accelerator == "none":
        options = {"accelerator": "none"}
    wanted = greedy(load(model, tmp_path, accelerator="none").model, PROMPT, 6)
    loaded = load(model, tmp_path, **options)
    for call in (1, 3, 2):
        block = blocks(loaded)[-1]
        failing = Failing(shared_of(block), call)
        with pytest.raises(RuntimeError, match="injected between the doors"):
            greedy(loaded.model, PROMPT, 6)
        assert failing.count == call
        found = greedy(loaded.model, PROMPT, 6)
        assert found[0] == wanted[0] and torch.equal(found[1], wanted[1])
        loaded.runtime.coordinator.check_integrity()
    assert loaded.runtime.health().is_clean


def test_dense_blocks_stay_and_unknown_ones_are_told(generated: Make, tmp_path: Path) -> None:
    dense = load(generated(SHAPES["deepseek2"]), tmp_path)
    assert type(dense.model.model.layers[0].mlp).__name__ == "DeepseekV2MLP"
    assert dense.warnings == []
    loaded = load(generated(Shape()), tmp_path)
    assert blocks(loaded) == []
    assert loaded.warnings == ["Qwen3MoeSparseMoeBlock stays as it is: MoEBlock knows no shared experts in it"]


def test_what_it_adopts_keeps_its_name(generated: Make, tmp_path: Path) -> None:
    plain, ours = (load(generated(SHAPES["qwen2moe"]), tmp_path, with_block=given) for given in (False, True))
    assert list(ours.model.state_dict()) == list(plain.model.state_dict())
    names = ["gate", "experts", "shared_expert", "shared_expert_gate"]
    assert [name for name, _ in blocks(ours)[0].named_children()] == names
    assert ours.dense is not None or plain.dense is None, "graphs know the block's parts"


def test_other_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="replaces a MoE block with shared experts, found Linear"):
        MoEBlock("model.layers.0.mlp", None, None, torch.nn.Linear(2, 2))


def test_layers_on_two_accelerators(generated: Make, tmp_path: Path) -> None:
    """By the packaged file, with devices that every machine has."""
    model = generated(replace(SHAPES["deepseek2"], layers=4))
    text = packaged_rules("deepseek2-multi-gpu").read_text()
    file = tmp_path / "two.yaml"
    file.write_text(text.replace("cuda:", "emulated:").replace(r"(\d|1[0-3])", "[01]"))
    answers = []
    for accelerator in ("none", "auto"):
        overrides = {"cpu_backend": "torch_reference", "cache_size": 3}
        overrides |= {"accelerator": "none"} if accelerator == "none" else {}
        engine = build_engine(model.path, rules_path=file, progress=False, option_overrides=overrides)
        engine.end_ids = set()
        answers.append(list(engine.tokens(PROMPT, Sampling(max_new_tokens=6, temperature=0))))
    assert len(blocks(engine.loaded)) == 3
    assert [lane.layers for lane in engine.runtime.lanes] == [(1,), (2, 3)]
    assert answers[0] == answers[1]


class SleepingCpu(CpuBackend):
    """Takes `seconds` for a share, without a core, and answers with zeros."""

    name, answers_pairs, seconds = "sleeping", False, 0.0

    def __init__(self) -> None:
        self._ready_s, self._answer = 0.0, torch.empty(0)

    def add_layer(self, experts: LayerExperts) -> None:
        """Nothing to note."""

    def submit(self, layer: int, routed: Routed) -> None:
        self._ready_s, self._answer = time.perf_counter() + self.seconds, torch.zeros_like(routed.hidden)

    def is_done(self) -> bool:
        return time.perf_counter() >= self._ready_s

    def wait(self) -> torch.Tensor:
        return self._answer


@pytest.mark.parametrize(("cpu_s", "shared_s"), [(0.03, 0.02), (0.02, 0.03)], ids=["CPU longer", "shared longer"])
def test_a_step_is_shorter_by_the_smaller_of_both(
    generated: Make, tmp_path: Path, cpu_s: float, shared_s: float
) -> None:
    """DeepSeek-V2-Lite's 64 experts, top-6, and two shared, narrow, on the clock; both take a time that is known."""
    shape = replace(DEEPSEEK_V2_LITE_LAYER, hidden=256, heads=4, kv_heads=4, head_dim=64, inter=256, dense_inter=512,
                    kv_lora_rank=64, q_lora_rank=64, rope_dim=32, types=(Type.Q8_0,) * 3)  # fmt: skip
    options = {
        "accelerator": "emulated:timed:a6000-xeon5220r", "profile": "a6000-xeon5220r", "cache_size": "50%",
        "scheduler": "static", "fallback": False, "follow_pace": False, "prefetch_size": 0,
    }  # fmt: skip
    cpu = {given: SleepingCpu() for given in (False, True)}
    models = {
        given: load(generated(shape), tmp_path, with_block=given, assemble=partial(assemble, cpu=cpu[given]), **options)
        for given in cpu
    }
    for given, loaded in models.items():
        cpu[given].seconds = cpu_s
        shared = shared_of(loaded.model.model.layers[1].mlp)
        shared.forward = lambda hidden: (time.sleep(shared_s), torch.zeros_like(hidden))[1]  # type: ignore[assignment]
    took: dict[bool, list[float]] = {False: [], True: []}
    with torch.inference_mode():
        for seed in range(12):
            hidden = torch.randn(1, 1, 256, generator=torch.Generator().manual_seed(seed))
            for given, loaded in models.items():
                stats, began = loaded.runtime.coordinator.stats, time.perf_counter()
                before = stats.experts_on_cpu, stats.experts_on_gpu
                loaded.model.model.layers[1].mlp(hidden)
                if stats.experts_on_cpu > before[0] and stats.experts_on_gpu > before[1]:
                    took[given].append(time.perf_counter() - began)
    assert min(map(len, took.values())) > 4, "these steps are no hybrid ones"
    own, ours = (min(seconds) for seconds in took.values())  # what else the machine does makes steps longer only
    print(f"own block {own * 1e3:.2f} ms, ours {ours * 1e3:.2f} ms")
    assert own - ours == pytest.approx(min(cpu_s, shared_s), rel=0.1)
