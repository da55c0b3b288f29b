"""Gates asked together say what each of them says, in a fraction of the operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV2Config, DeepseekV3Config, Ernie4_5_MoeConfig, MiniMaxM2Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hybrimoe_kt.host.hf.gates import Gate, GateRow, _OneByOne, _Together

HIDDEN, EXPERTS, TOP_K, LAYERS = 48, 16, 4, 5
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}


def softmax(groups: int = 1) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=EXPERTS, norm_topk_prob=True, **SIZES)), ()


def biased_sigmoid(groups: int = 1) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    config = DeepseekV3Config(n_routed_experts=EXPERTS, n_group=groups, topk_group=max(1, groups // 2), **SIZES)
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias = torch.randn(EXPERTS) * 0.3
    return router, ()


def grouped() -> tuple[torch.nn.Module, tuple[Any, ...]]:
    return biased_sigmoid(groups=4)


def grouped_softmax() -> tuple[torch.nn.Module, tuple[Any, ...]]:
    config = DeepseekV2Config(
        n_routed_experts=EXPERTS,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        num_attention_heads=4,
        **SIZES,
    )
    return DeepseekV2TopkRouter(config), ()


def biased_from_outside() -> tuple[torch.nn.Module, tuple[Any, ...]]:
    return MiniMaxM2TopKRouter(MiniMaxM2Config(num_local_experts=EXPERTS, **SIZES)), (torch.randn(EXPERTS) * 0.3,)


def ernie() -> tuple[torch.nn.Module, tuple[Any, ...]]:
    config = Ernie4_5_MoeConfig(moe_num_experts=EXPERTS, moe_k=TOP_K, hidden_size=HIDDEN)
    return Ernie4_5_MoeTopKRouter(config), ()


KINDS = {
    softmax: _Together,
    biased_sigmoid: _Together,
    biased_from_outside: _Together,
    grouped: _OneByOne,
    grouped_softmax: _OneByOne,
    ernie: None,
}


def row_of(kind: Any, dtype: torch.dtype = torch.float32, norms: bool = True) -> tuple[list[Gate], GateRow]:
    torch.manual_seed(0)
    gates = []
    for _ in range(LAYERS):
        module, inputs = kind()
        module.weight = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, dtype=dtype) * HIDDEN**-0.5)
        gates.append(Gate(module, torch.rand(HIDDEN, dtype=dtype) + 0.5 if norms else None, inputs))
    return gates, GateRow(gates, CPU)


def asked(row: GateRow, place: int, ahead: int, hidden: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    predict = row.predictor(place, range(10, 10 + LAYERS), slice(place + 1, place + 1 + ahead))
    ids = torch.full((ahead, len(hidden), TOP_K), -1)
    scores = torch.full((ahead, EXPERTS), torch.nan)
    predict(hidden, ids, scores)
    return predict, ids, scores


@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_they_say_what_each_says(kind: Any, norms: bool, num_tokens: int) -> None:
    gates, row = row_of(kind, norms=norms)
    hidden = torch.randn(num_tokens, HIDDEN)
    for place, ahead in ((0, 3), (1, 2), (3, 1)):
        predict, ids, scores = asked(row, place, ahead, hidden)
        assert KINDS[kind] is None or isinstance(predict, KINDS[kind])
        assert list(predict.layers) == list(range(11 + place, 11 + place + ahead)) and predict.num_experts == EXPERTS
        for number in range(ahead):
            later = gates[place + 1 + number]
            corrected = hidden * (later.norm / gates[place].norm) if norms else hidden
            logits, _, chosen = later.module.forward(corrected, *later.inputs)
            assert torch.equal(ids[number].sort(-1).values, chosen.sort(-1).values)
            torch.testing.assert_close(scores[number], torch.softmax(logits.float(), -1).mean(0))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("kind", [softmax, biased_sigmoid, biased_from_outside], ids=lambda kind: kind.__name__)
def test_one_launch_chooses_alike(kind: Any, num_tokens: int) -> None:
    """By the kernel that the routers' rule asks for, in Triton's interpreter."""
    pytest.importorskip("triton")
    gates, row = row_of(kind)
    hidden = torch.randn(num_tokens, HIDDEN)
    _, wanted_ids, wanted_scores = asked(row, 0, 3, hidden)
    for gate in gates:
        gate.module.kernel = "triton"
    predict, ids, scores = asked(row, 0, 3, hidden)
    assert predict._is_one_launch
    assert torch.equal(ids.sort(-1).values, wanted_ids.sort(-1).values)
    torch.testing.assert_close(scores, wanted_scores)


def test_in_bfloat16_most_agree() -> None:
    """Rounding differs with the order of a product's sums."""
    gates, row = row_of(softmax, torch.bfloat16)
    hidden = torch.randn(200, HIDDEN, dtype=torch.bfloat16)
    predict, ids, scores = asked(row, 0, 3, hidden)
    assert isinstance(predict, _Together) and scores.dtype == torch.float32 and scores.isfinite().all()
    for number in range(3):
        later = gates[1 + number]
        _, _, chosen = later.module.forward(hidden * (later.norm.float() / gates[0].norm.float()).bfloat16())
        assert (ids[number].sort(-1).values == chosen.sort(-1).values).float().mean() > 0.97


def test_the_gates_themselves_are_views_of_one_tensor() -> None:
    """No second copy of the weights; and the gates go on working."""
    gates, row = row_of(softmax)
    assert row._weights is not None
    for place, gate in enumerate(gates):
        assert gate.module.weight.data_ptr() == row._weights[place].data_ptr()
    before = gates[2].module.forward(torch.ones(1, HIDDEN))[0]
    assert torch.equal(before, torch.nn.functional.linear(torch.ones(1, HIDDEN), row._weights[2]))


def test_gates_of_different_sizes_are_asked_one_by_one() -> None:
    gates, _ = row_of(softmax)
    module = Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=2 * EXPERTS, norm_topk_prob=True, **SIZES))
    module.weight = torch.nn.Parameter(torch.randn(2 * EXPERTS, HIDDEN))
    row = GateRow([*gates, Gate(module, None, ())], CPU)
    predict = row.predictor(0, range(LAYERS + 1), slice(1, 3))
    assert isinstance(predict, _OneByOne)


class _Count(TorchDispatchMode):
    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not any(name in str(func) for name in ("view", "slice", "select", "unsqueeze", "detach", "expand"))
        return func(*args, **(kwargs or {}))


def test_three_gates_take_a_handful_of_operations() -> None:
    """On a device each is a launch; one by one it was some thirty."""
    _, row = row_of(softmax)
    predict, ids, scores = asked(row, 0, 3, torch.randn(1, HIDDEN))
    with torch.inference_mode(), _Count() as count:
        predict(torch.randn(1, HIDDEN), ids, scores)
    assert count.num - 1 <= 5, "product, ratio, softmax, choice, and one to spare"


def test_asking_leaves_nothing_that_the_next_question_would_give_back() -> None:
    """A captured question goes on writing where it did, whatever shape was asked for since."""
    predict = row_of(softmax)[1].predictor(0, range(LAYERS), slice(1, 3))
    before = dict(vars(predict))
    for num_tokens in (1, 7):
        ids = torch.empty(2, num_tokens, TOP_K, dtype=torch.int64)
        predict(torch.randn(num_tokens, HIDDEN), ids, torch.empty(2, EXPERTS))
    assert vars(predict).keys() == before.keys()
    assert all(vars(predict)[name] is value for name, value in before.items())
