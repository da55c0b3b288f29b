"""A whole model through the Triton kernels, in Triton's interpreter: the same greedy tokens as without them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybrimoe_kt.engine.build import build_engine
from hybrimoe_kt.engine.chat.chat_template import chat_prompt
from hybrimoe_kt.engine.engine import Sampling

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here"),
]


@pytest.mark.parametrize("cache", ["all", "25%"])
def test_same_tokens_with_and_without_the_kernels(tiny_model: Path, cache: str) -> None:
    """All experts on the "GPU", and a quarter: then the CPU, transfers and slots take part."""
    answers, on_gpu = [], 0
    for accelerator, backend in (("none", "auto"), ("emulated", "triton")):
        overrides = {
            "accelerator": accelerator, "gpu_backend": backend, "cache_size": cache, "cpu_backend": "torch_reference",
        }  # fmt: skip
        engine = build_engine(tiny_model, progress=False, option_overrides=overrides)
        prompt = chat_prompt(engine.tokenizer, [{"role": "user", "content": "Hello! How are you today?"}])
        answers.append(list(engine.tokens(prompt, Sampling(max_new_tokens=6, temperature=0))))
        on_gpu = engine.last_run()["experts_on_gpu"]
        assert engine.runtime.health().is_clean, "the CPU answered in the kernels' place"
    assert answers[0] == answers[1]
    assert on_gpu > 0
