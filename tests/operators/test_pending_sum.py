"""Sums that wait for the norm behind them: the bits of torch's additions, whoever asks first."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.launches import Launches
from hybrimoe_kt.operators.norm import FusedRMSNorm
from hybrimoe_kt.operators.pending_sum import PendingSum, pending, sums_may_wait

from .test_rows import CONTRACT, of_kind

WIDTH = 64


def terms(count: int, *shape: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(count)
    return [torch.randn(*(shape or (1, 1, WIDTH)), generator=random).to(dtype) for _ in range(count)]


USES: dict[str, Callable[[Any], Any]] = {
    "times": lambda x: x * 2,
    "from": lambda x: 1 - x,
    "after": lambda x: 1.0 + x,
    "cell": lambda x: x[0, 0, 3:5],
    "length": lambda x: torch.tensor(len(x)),
    "method": lambda x: x.pow(2).mean(-1, keepdim=True),
    "function": lambda x: functional.silu(x),
    "listed": lambda x: torch.cat([x, x], dim=-1),
    "broadcast": lambda x: x + torch.ones(3, 1, WIDTH, dtype=x.dtype),
    "dtype": lambda x: x.to(torch.float32),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("use", USES)
def test_it_answers_as_the_tensor_that_it_becomes(use: str, count: int) -> None:
    given = terms(count)
    wanted = given[0] if count == 1 else given[0] + given[1] if count == 2 else given[0] + (given[1] + given[2])
    asked = PendingSum(*given)
    assert torch.equal(USES[use](asked), USES[use](wanted))
    assert len(asked.terms) == 1 and torch.equal(asked.total, wanted), "and is known from then on"


def test_what_is_added_is_added_later() -> None:
    """As a decoder layer adds: what it was given first, on either side."""
    first, second, third = terms(3)
    assert [*map(id, (first + PendingSum(second, third)).terms)] == [*map(id, (first, second, third))]
    assert len((PendingSum(first) + second).terms) == 2
    assert torch.equal((PendingSum(first, second) + third).total, (first + second) + third)
    assert torch.equal((third + PendingSum(*terms(3))).total, third + PendingSum(*terms(3)).total)
    assert torch.equal(
        (PendingSum(first, second) + PendingSum(second, third)).total, (first + second) + (second + third)
    )


def layer(norm: nn.Module, residual: torch.Tensor, attended: torch.Tensor, routed: torch.Tensor) -> Any:
    """As a decoder layer adds: the states behind it, what its second norm answers, and the next layer's first."""
    states = residual + attended
    before = norm(states)
    states = states + routed
    return states, before, norm(states)


@pytest.mark.parametrize("family", ["qwen3moe", "deepseek2", "qwen3next"])
def test_a_norm_adds_up_in_its_own_launch(family: str) -> None:
    pytest.importorskip("triton")
    stock = of_kind(family, "rmsnorm").half()
    residual, attended, routed, shared = terms(4, 1, 1, len(stock.weight))
    ours = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock), kernel="triton")
    ours(residual)  # asks
    launches = Launches()
    with launches.of("layer"), launches.counting(), sums_may_wait():
        states, before, after = layer(
            ours, residual, pending(attended, kernel="triton"), pending(routed, shared, kernel="triton")
        )
    assert launches.kernels == {("layer", "rms_norm_kernel"): 2}, "and nothing is added by torch"
    wanted = layer(stock, residual, attended, routed + shared)
    assert torch.equal(states.total, wanted[0])
    for found, norm in zip((before, after), wanted[1:], strict=True):
        torch.testing.assert_close(found, norm, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("odd", ["strided", "biased", "torch"])
def test_without_a_kernel_torch_adds(odd: str) -> None:
    pytest.importorskip("triton")
    first, second = terms(2)
    if odd == "strided":
        second = terms(1, 1, 1, 2 * WIDTH)[0][..., ::2]
    stock: Any = nn.LayerNorm(WIDTH) if odd == "biased" else of_kind("qwen3moe", "rmsnorm")
    stock.weight = nn.Parameter(torch.rand(WIDTH))
    stock = stock.half()
    ours = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock), kernel="torch" if odd == "torch" else "triton")
    given = PendingSum(first, second)
    torch.testing.assert_close(ours(given), stock(first + second), rtol=2e-3, atol=1e-5)
    assert torch.equal(given.total, first + second)


def test_on_a_cpu_nothing_is_pending() -> None:
    first, second = terms(2)
    for kernel in ("auto", "torch", "sdpa", "flashinfer"):
        with sums_may_wait():
            assert torch.equal(pending(first, second, kernel=kernel), first + second)


def test_nothing_is_pending_for_a_caller_who_has_not_said_that_it_may_be() -> None:
    pytest.importorskip("triton")
    first, second = terms(2)
    assert isinstance(pending(first, second, kernel="triton"), torch.Tensor)
    with sums_may_wait():
        assert isinstance(pending(first, second, kernel="triton"), PendingSum)
    assert isinstance(pending(first, second, kernel="triton"), torch.Tensor)


@pytest.mark.parametrize("change", ["+=", "-=", "*=", "/=", "[]"])
def test_a_change_in_place_is_seen_by_who_holds_the_sum(change: str) -> None:
    first, second = terms(2)
    wanted, given = first + second, PendingSum(first, second)
    changed: Any = given
    for each in (wanted, changed):
        if change == "[]":
            each[..., 0] = 3.0
        else:
            name = {"+=": "__iadd__", "-=": "__isub__", "*=": "__imul__", "/=": "__itruediv__"}[change]
            getattr(each, name)(2.0)
    assert torch.equal(given.total, wanted)


def test_it_is_copied_and_kept_as_any_object() -> None:
    given = PendingSum(*terms(2))
    for copied in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert torch.equal(copied.total, given.total)
    assert given in {given}
