"""Whole models whose norms, rotations and routers are kernels, in Triton's interpreter: the stock model's answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.launches import Launches, rules_with
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.operators.norm import FusedRMSNorm
from hybrimoe_kt.operators.router import FusedRouter
from tests.support.generated_model import GeneratedModel, Shape

from .stock import greedy, logits_of, stock_model
from .test_equality import PROMPT, SHAPES

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")
OTHER_RULES = {
    "deepseek2-old-kv_b-q_lora-yarn": "deepseek2",
    "deepseek3": "deepseek2",
    "mixtral-old-experts": "mixtral",
}
QUICK = ("qwen3moe", "deepseek3")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHAPES]


@pytest.mark.parametrize("name", EACH)
def test_logits_and_tokens_are_the_stock_models(
    generated: Callable[[Shape], GeneratedModel], name: str, tmp_path: Path
) -> None:
    model = generated(SHAPES[name])
    stock = stock_model(model)
    options = {"accelerator": "emulated", "cache_size": "50%", "prefetch_size": 2}
    options |= {"gpu_backend": "torch_reference", "cpu_backend": "torch_reference"}
    rules = rules_with(OTHER_RULES.get(name, name), "triton", tmp_path)
    ours = load_model(model.path, rules_path=rules, option_overrides=options, progress=False)
    launches, prompt = Launches(), PROMPT[:5]
    with launches.of("all"), launches.counting():
        found = logits_of(ours.model, prompt)
    torch.testing.assert_close(found, logits_of(stock, prompt), rtol=0, atol=1e-4)
    assert greedy(ours.model, prompt, 3)[0] == greedy(stock, prompt, 3)[0]
    modules = list(ours.model.modules())
    norms, routers = (sum(isinstance(m, kind) for m in modules) for kind in (FusedRMSNorm, FusedRouter))
    counted = {kernel: number for (_, kernel), number in launches.kernels.items()}
    assert counted["rms_norm_kernel"] == norms > 2
    assert counted["choose_experts_kernel"] >= routers > 0, "and the gates of the look-ahead"
    attentions = sum(hasattr(layer, "self_attn") for layer in ours.model.model.layers)
    assert counted["rotate_heads_kernel"] == attentions > 0
