"""Whole models through the Triton kernels, experts and dense weights, in the interpreter: the CPU's greedy tokens."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from hybrimoe_kt.host.hf.loading import LoadedModel, load_model
from hybrimoe_kt.quants import TYPES, kernel_types
from tests.support.generated_model import Shape, Type

from .test_equality import SHAPES
from .test_packed_weights import Make, only_experts

__all__ = ["only_experts"]  # a fixture

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")

PROMPT, TOKENS, WITHIN = list(range(40, 51)), 4, 0.1
"""A prompt for the kernels of many tokens, and steps for those of one; the largest error over the logits' spread.

Measured up to 0.067, over all types and architectures; in 122 of 144 steps the margin was larger.
"""


def load(path: Path, **options: object) -> LoadedModel:
    overrides = {"accelerator": "emulated", "gpu_backend": "triton", "cache_size": "all", "prefetch_size": 0}
    return load_model(path, device="emulated:0", option_overrides=overrides, progress=False, **options)  # type: ignore[arg-type]


@torch.no_grad()
def check(path: Path, rules: Path) -> LoadedModel:
    """Along the floats' greedy answer: every logit close, and the same token wherever the margin is larger."""
    exact = {"accelerator": "none", "cpu_backend": "torch_reference"}
    floats = load_model(path, rules_path=rules, option_overrides=exact, progress=False)
    ours = load(path)
    ids, caches = list(PROMPT), {}
    given = torch.tensor([ids])
    for _ in range(TOKENS):
        logits = {}
        for name, model in (("floats", floats.model), ("ours", ours.model)):
            answer = model(input_ids=given, use_cache=True, past_key_values=caches.get(name))
            caches[name] = answer.past_key_values
            logits[name] = answer.logits[0, -1].float()
        wanted, found = logits["floats"], logits["ours"]
        error = (found - wanted).abs().max() / wanted.std()
        assert error < WITHIN, error
        best, second = wanted.topk(2).values
        if best - second > 2 * (found - wanted).abs().max():
            assert found.argmax() == wanted.argmax()
        given = wanted.argmax().view(1, 1)
    return ours


def of(kind: Type, **changes: object) -> Shape:
    return Shape(types=(kind,) * 3, dense_type=kind, experts=4, top_k=4, inter=256, heads=8, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_model_through_the_kernels(generated: Make, kind: Type, only_experts: Path) -> None:
    ours = check(generated(of(kind)).path, only_experts)
    assert not [at for at, value in ours.model.state_dict().items() if at.endswith("_proj.weight")]
    health = ours.runtime.health()
    assert health.is_clean, "the CPU answered in the kernels' place"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [row.number for row in kernel_types()], ids=lambda number: TYPES[number].name)
def test_every_type_through_the_kernels(generated: Make, kind: int, only_experts: Path) -> None:
    check(generated(of(Type(kind))).path, only_experts)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_through_the_kernels(generated: Make, name: str, only_experts: Path) -> None:
    shape = dataclasses.replace(SHAPES[name], experts=4, top_k=4, groups=2, dense_type=Type.Q8_0)
    check(generated(shape).path, only_experts)
