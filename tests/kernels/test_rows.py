"""Kernels on rows of floats against their naive forms, and those against Transformers' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hybrimoe_kt.backends.gpu_triton import target_of
from hybrimoe_kt.kernels.choose_experts import choose_experts, naive_choose_experts
from hybrimoe_kt.kernels.rms_norm import naive_rms_norm, rms_norm
from hybrimoe_kt.kernels.rotate_heads import naive_rotate_heads, rotate_heads
from hybrimoe_kt.kernels.router_logits import naive_router_logits, router_logits
from hybrimoe_kt.kernels.row_configs import choose_config, logits_config, norm_config, rotate_config
from hybrimoe_kt.kernels.row_forms import Ranking, Rotation
from hybrimoe_kt.kernels.targets import TARGETS
from tests.kernels.layers import DEVICE

pytestmark = pytest.mark.kernels

TARGET, NAN = target_of(DEVICE), float("nan")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16", "bf16"])


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


CUTS = TARGET.interpreted
"""Whether bfloat16 is cut off, not rounded: the interpreter does."""


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """One rounding apart at most, of a value in a hundred where the dtype is short."""
    found, is_cut = found.cpu(), CUTS and wanted.dtype == torch.bfloat16
    step = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[wanted.dtype] * (1 + 2 * is_cut)
    torch.testing.assert_close(found, wanted, rtol=step, atol=step if is_cut else step / 100)
    assert is_cut or wanted.dtype == torch.float32 or (found != wanted).float().mean() < 0.01


@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (70, 40), (3, 168)], ids=str)
@pytest.mark.parametrize("form", [(0.0, True), (1.0, False)], ids=["rounds-first", "plus-one"])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype, form: tuple[float, bool]) -> None:
    offset, rounds_first = form
    wide, weight = random(rows, width + 16, dtype=dtype), random(width, dtype=dtype, seed=2)
    x = wide[:, 8 : width + 8]  # a part of a wider row, as of a product that does several things
    out = torch.full((rows, width), NAN, dtype=dtype, device=DEVICE)
    given = wide.to(DEVICE)[:, 8 : width + 8]
    config = norm_config(TARGET, width)
    rms_norm(given, weight.to(DEVICE), 1e-5, out, config, offset=offset, rounds_first=rounds_first)
    assert_close(out, naive_rms_norm(x, weight, 1e-5, offset=offset, rounds_first=rounds_first))


@each_dtype
def test_rms_norm_of_a_sum(dtype: torch.dtype) -> None:
    x, residual, weight = random(5, 96, dtype=dtype), random(5, 96, dtype=dtype, seed=2), random(96, dtype=dtype)
    out, total = (torch.full((5, 96), NAN, dtype=dtype, device=DEVICE) for _ in range(2))
    given = x.to(DEVICE), weight.to(DEVICE), 1e-6, out, norm_config(TARGET, 96)
    rms_norm(*given, residual=residual.to(DEVICE), total=total)
    assert_close(total, residual + x)
    assert_close(out, naive_rms_norm(residual + x, weight, 1e-6))


@each_dtype
def test_rms_norm_of_a_sum_of_three(dtype: torch.dtype) -> None:
    """The last two are added, and rounded, first; in halves another order has other bits."""
    x, residual, more, weight = (random(5, 96, dtype=dtype, seed=seed) for seed in range(4))
    out, total = (torch.full((5, 96), NAN, dtype=dtype, device=DEVICE) for _ in range(2))
    given = x.to(DEVICE), weight[0].to(DEVICE), 1e-6, out, norm_config(TARGET, 96)
    rms_norm(*given, residual=residual.to(DEVICE), more=more.to(DEVICE), total=total)
    assert_close(total, x + (residual + more))
    if not CUTS or dtype == torch.float16:
        assert torch.equal(total.cpu(), x + (residual + more))
    assert_close(out, naive_rms_norm(x + (residual + more), weight[0], 1e-6))


ROTATIONS = {
    "halves": Rotation(),
    "pairs-wide": Rotation(from_pairs=True, to_pairs=True, is_wide=True),
    "pairs-to-halves": Rotation(from_pairs=True),
}


@each_dtype
@pytest.mark.parametrize("half", [32, 24, 12], ids=["whole", "three-quarters", "odd"])
@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_rotate_heads(rotation: Rotation, half: int, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, width = 3, 6, 2, 64
    # [heads, T, W] as attention has them: transposed, and of a wider product
    query = random(tokens, heads, 2 * width, dtype=dtype).transpose(0, 1)[..., :width]
    key = random(tokens, kv_heads, width, dtype=dtype, seed=2).transpose(0, 1)
    angles = random(tokens, half, seed=3)
    kind = torch.float32 if rotation.is_wide else dtype
    cos, sin = (turned.to(kind) for turned in (angles.cos(), angles.sin()))
    outs = [torch.full((n, tokens, width), NAN, dtype=dtype, device=DEVICE) for n in (heads, kv_heads)]
    # not contiguous either, as parts of complex numbers are not
    cos_sin = torch.stack((cos, sin), dim=-1).to(DEVICE)
    given = query.to(DEVICE), key.to(DEVICE), *cos_sin.unbind(-1)
    rotate_heads(*given, *outs, rotation, rotate_config(TARGET))
    for out, x in zip(outs, (query, key), strict=True):
        wanted = naive_rotate_heads(x, cos, sin, rotation)
        assert torch.equal(out.cpu()[..., 2 * half :], x[..., 2 * half :])
        assert_close(out, wanted)


@each_dtype
@pytest.mark.parametrize("weights", FLOATS, ids=["fp32 weights", "fp16 weights", "bf16 weights"])
def test_router_logits(dtype: torch.dtype, weights: torch.dtype) -> None:
    x, weight = random(3, 360, dtype=dtype), random(130, 360, dtype=weights, seed=2)
    out = torch.full((3, 130), NAN, device=DEVICE)
    router_logits(x.to(DEVICE), weight.to(DEVICE), out, logits_config(TARGET))
    torch.testing.assert_close(out.cpu(), naive_router_logits(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weights", FLOATS, ids=["fp32 weights", "fp16 weights", "bf16 weights"])
def test_logits_of_several_routers(weights: torch.dtype) -> None:
    """Each with its own factors on the states, an odd number of experts: programs that have two routers'."""
    x, weight, factors = (
        random(2, 360).half(),
        random(3 * 43, 360, dtype=weights, seed=2),
        random(3, 360, seed=3).half(),
    )
    out = torch.full((2, 3 * 43), NAN, device=DEVICE)
    router_logits(x.to(DEVICE), weight.to(DEVICE), out, logits_config(TARGET), factors.to(DEVICE))
    within = 0.3 if CUTS and weights == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.cpu(), naive_router_logits(x, weight, factors), rtol=1e-5, atol=within)


RANKINGS: dict[str, tuple[int, Ranking, bool]] = {
    "softmax": (60, Ranking(4), False),
    "softmax-bf16": (128, Ranking(8, rounded_to=torch.bfloat16), False),
    "plain-scaled": (64, Ranking(6, is_normalised=False, factor=16.0), False),
    "sigmoid-biased": (96, Ranking(8, is_sigmoid=True, factor=2.5), True),
    "groups-of-two": (64, Ranking(8, is_sigmoid=True, num_groups=8, num_best_groups=4), True),
    "odd-groups": (60, Ranking(6, num_groups=3, num_best_groups=2, is_group_of_two=False, is_normalised=False), False),
    "most": (512, Ranking(10, rounded_to=torch.float16), False),
    "one": (5, Ranking(1), False),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", RANKINGS)
def test_choose_experts(name: str, dtype: torch.dtype) -> None:
    num_experts, ranking, is_biased = RANKINGS[name]
    logits = (3 * random(2, num_experts)).to(dtype)
    bias = random(num_experts, seed=4) / 5 if is_biased else None
    weights, ids, probabilities = chosen(logits, ranking, bias)
    wanted_weights, wanted_ids, wanted_probabilities = naive_choose_experts(logits, ranking, bias)
    assert torch.equal(ids, wanted_ids)
    step = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[ranking.rounded_to]
    torch.testing.assert_close(weights, wanted_weights, rtol=step, atol=1e-7)
    assert torch.equal(weights, weights.to(ranking.rounded_to).float())
    torch.testing.assert_close(probabilities, wanted_probabilities, rtol=1e-5, atol=1e-8)


def chosen(logits: torch.Tensor, ranking: Ranking, bias: torch.Tensor | None = None) -> list[torch.Tensor]:
    num_rows, num_experts = logits.shape
    outs: list[torch.Tensor] = [
        torch.full((num_rows, ranking.top_k), NAN, device=DEVICE),
        torch.full((num_rows, ranking.top_k), -7, device=DEVICE),
        torch.full((num_rows, num_experts), NAN, device=DEVICE),
    ]
    given = logits.to(DEVICE), ranking, None if bias is None else bias.to(DEVICE)
    choose_experts(*given, *outs, choose_config(TARGET))
    return [out.cpu() for out in outs]


def test_of_equal_experts_the_first_are_chosen() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0]])
    assert chosen(logits, Ranking(5))[1].tolist() == [[1, 3, 4, 2, 5]]
    assert naive_choose_experts(logits, Ranking(5))[1].tolist() == [[1, 3, 4, 2, 5]]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")], ids=str)
def test_whatever_the_logits_are_the_chosen_exist(bad: float) -> None:
    """Ids are addresses to what comes next."""
    ranking = Ranking(4, num_groups=2, num_best_groups=1)
    for logits in (torch.full((1, 12), bad), torch.arange(12.0)[None].index_fill(1, torch.tensor([1, 7]), bad)):
        ids = chosen(logits, ranking)[1][0].tolist()
        assert len(set(ids)) == 4
        assert all(0 <= index < 12 for index in ids)


def test_each_layers_bias_is_its_own() -> None:
    """Gates of several layers are asked in one launch, without their weights."""
    logits, bias = random(4, 8), 3 * random(2, 8, seed=5)
    outs: list[Any] = [torch.full((4, 2), -7, device=DEVICE), torch.full((4, 8), NAN, device=DEVICE)]
    given = logits.to(DEVICE), Ranking(2, is_sigmoid=True), bias.to(DEVICE), None
    choose_experts(*given, *outs, choose_config(TARGET))
    for row in range(4):
        wanted = naive_choose_experts(logits[row], Ranking(2, is_sigmoid=True), bias[row // 2])
        assert torch.equal(outs[0][row].cpu(), wanted[1])
        torch.testing.assert_close(outs[1][row].cpu(), wanted[2])


def test_heads_share_a_program_and_wide_rows_have_more_threads() -> None:
    target = TARGETS["sm_90"]
    heads, hidden = norm_config(target, 128), norm_config(target, 2048)
    assert (heads.rows, heads.num_warps) == (8, 4)
    assert (hidden.rows, hidden.num_warps) == (1, 8)
    assert norm_config(target, 7168).columns == 8192
