"""With the reference backend on both sides, the model is the stock model, whatever runs where."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from tests.support.generated_model import GeneratedModel, Shape, Type

from .stock import greedy, logits_of, stock_model

TYPES = {
    "q8_0": (Type.Q8_0,) * 3,
    "q4_k": (Type.Q4_K,) * 3,
    "q4_k-q6_k": (Type.Q4_K, Type.Q4_K, Type.Q6_K),
    "f16": (Type.F16,) * 3,
}
SHAPES = {
    "qwen3moe": Shape(),
    "qwen2moe": Shape(architecture="qwen2moe", head_dim=64, shared_experts=2),
    "mixtral": Shape(architecture="llama", head_dim=64),
    "mixtral-old-experts": Shape(architecture="llama", head_dim=64, expert_tensors=True),
    "olmoe": Shape(architecture="olmoe", head_dim=64),
    "glm4moe": Shape(architecture="glm4moe", layers=3, qk_norm=True),
    "qwen3next": Shape(architecture="qwen3next", layers=4, linear_heads=(2, 6)),  # 2 and 4 would be sorted and
    "qwen35moe": Shape(architecture="qwen35moe", layers=4, linear_heads=(2, 6)),  # unsorted by the same permutation
    "granitemoe": Shape(architecture="granitemoe", head_dim=64),
    "minimax-m2": Shape(architecture="minimax-m2"),
    "ernie4_5-moe": Shape(architecture="ernie4_5-moe", head_dim=64),
    "deepseek2": Shape(architecture="deepseek2", layers=3),
    "deepseek3": Shape(architecture="deepseek2", layers=3, q_lora_rank=64, yarn_factor=4.0, sigmoid=True),
    "deepseek2-old-kv_b-q_lora-yarn": Shape(
        architecture="deepseek2", layers=3, split_kv_b=False, q_lora_rank=64, yarn_factor=4.0
    ),
}  # fmt: skip
FULL = ("qwen3moe", "deepseek2")
"""Tried with every type; the others differ around the experts, not in them: with one, and another in the slow tests."""
CASES = [
    pytest.param(shape, types, marks=() if shape in FULL or types == "q4_k-q6_k" else pytest.mark.slow)
    for shape in SHAPES
    for types in TYPES
    if shape in FULL or types in ("q8_0", "q4_k-q6_k")
]
PLACES: dict[str, dict[str, Any]] = {
    "none": {"accelerator": "none"},
    "emulated-0": {"accelerator": "emulated", "cache_size": 0},
    "emulated-1": {"accelerator": "emulated", "cache_size": 1},
    "emulated-half": {"accelerator": "emulated", "cache_size": 0.5},
    "emulated-all": {"accelerator": "emulated", "cache_size": "all"},
}
PROMPT = random.Random(7).choices(range(250), k=23)


def load(model: GeneratedModel, **overrides: Any) -> LoadedModel:
    return load_model(model.path, option_overrides={"cpu_backend": "torch_reference", **overrides}, progress=False)


@pytest.mark.parametrize(("shape", "types"), CASES)
def test_logits_and_greedy_tokens_equal_the_stock_model(
    generated: Callable[[Shape], GeneratedModel], shape: str, types: str
) -> None:
    import dataclasses

    model = generated(dataclasses.replace(SHAPES[shape], types=TYPES[types]))
    stock = stock_model(model)
    wanted = logits_of(stock, PROMPT)
    wanted_tokens, _ = greedy(stock, PROMPT, 12)
    assert wanted.std() > 0.3, "a model whose logits are all alike would prove nothing"
    for place, overrides in PLACES.items():
        ours = load(model, **overrides)
        torch.testing.assert_close(logits_of(ours.model, PROMPT), wanted, rtol=0, atol=1e-4, msg=place)
        assert greedy(ours.model, PROMPT, 12)[0] == wanted_tokens, place


def test_the_correction_of_the_routing_keeps_its_precision(generated: Callable[[Shape], GeneratedModel]) -> None:
    model = generated(SHAPES["deepseek3"])
    ours = load_model(model.path, dtype=torch.bfloat16, progress=False, option_overrides={"accelerator": "none"})
    for name, value in ours.model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(value, model.state[name])


def test_emulated_runs_really_use_slots(generated: Callable[[Shape], GeneratedModel]) -> None:
    """Guards the equality tests above: experts do run from slots, arrive by transfer, and are evicted."""
    ours = load(generated(SHAPES["qwen3moe"]), accelerator="emulated", cache_size=2, prefetch_size=2)
    greedy(ours.model, PROMPT, 16)
    stats = ours.runtime.coordinator.stats.snapshot()
    assert stats["experts_on_gpu"] > 0
    assert stats["experts_on_cpu"] > 0
    assert stats["num_transfers"] > 0


@given(
    capacity=st.integers(0, 8),
    policy=st.sampled_from(["adaptive", "mrs", "lru", "least_stale"]),
    scheduler=st.sampled_from(["paper", "balanced", "static", "gpu_only", "cpu_only"]),
    prefetch_size=st.integers(0, 4),
    prefetch_depth=st.integers(1, 3),
    predictor=st.sampled_from(["stale_gate", "corrected_gate", "history", "transition"]),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_outputs_are_identical_whatever_decides(
    generated: Callable[[Shape], GeneratedModel],
    capacity: int, policy: str, scheduler: str, prefetch_size: int, prefetch_depth: int, predictor: str,
) -> None:  # fmt: skip
    """Bit for bit: where an expert runs, and what the cache holds, never shows in the output."""
    model = generated(Shape(layers=3))
    reference = _identity_reference(model)
    ours = load(
        model, accelerator="emulated", cache_size=capacity, policy=policy, scheduler=scheduler,
        prefetch_size=prefetch_size, prefetch_depth=prefetch_depth, predictor=predictor,
    )  # fmt: skip
    tokens, rows = greedy(ours.model, PROMPT, 8)
    assert tokens == reference[0]
    assert torch.equal(rows, reference[1])


_references: dict[str, tuple[list[int], torch.Tensor]] = {}


def _identity_reference(model: GeneratedModel) -> tuple[list[int], torch.Tensor]:
    key = str(model.path)
    if key not in _references:
        _references[key] = greedy(load(model, accelerator="none").model, PROMPT, 8)
    return _references[key]
