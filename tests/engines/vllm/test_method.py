"""What a layer does in one step, without an engine around it: in which order, and how often it looks at the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from hybrimoe_kt.host.vllm import method as methods
from hybrimoe_kt.host.vllm.method import HybridMethod
from hybrimoe_kt.host.vllm.steps import StepReader


class Attention:
    """One layer's metadata; says how often it is asked."""

    asked = 0
    max_query_len = 1

    @property
    def num_actual_tokens(self) -> int:
        Attention.asked += 1
        return 3


def test_shared_experts_run_beside_the_cpus_share(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Experts:
        def begin(self, *_: Any) -> str:
            done.append("begin")
            return "begun"

        def finish(self, begun: str) -> torch.Tensor:
            done.append(f"finish what was {begun}")
            return torch.zeros(1)

    monkeypatch.setattr(methods, "get_forward_context", lambda: None)
    layer: Any = HybridMethod.__new__(HybridMethod)
    layer.experts, layer.reader, layer.layer_number = Experts(), SimpleNamespace(step=lambda context: None), 0
    layer._weights_go_on_input = False
    layer.apply(None, torch.zeros(1, 4), torch.ones(1, 2), torch.zeros(1, 2), lambda *_: done.append("shared"), None)
    assert done == ["begin", "shared", "finish what was begun"]


def test_a_step_is_read_once_for_all_layers() -> None:
    reader = StepReader(tokens_a_request=1, sees_other_ranks=False)
    context = SimpleNamespace(attn_metadata={str(n): Attention() for n in range(48)}, is_padding=None)
    steps = [reader.step(context) for _ in range(48)]
    assert set(steps) == {steps[0]}
    assert (steps[0].num_tokens, steps[0].phase) == (3, "decode")
    assert Attention.asked == 1
    captured = SimpleNamespace(attn_metadata={"0": Attention()}, is_padding=torch.ones(4, dtype=torch.bool))
    assert reader.step(captured).is_trial
