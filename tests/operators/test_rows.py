"""Norms, rotations and routers of every family: the stock module's bits on a CPU, its values from the kernels."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.launches import Launches
from hybrimoe_kt.backends import row_kernels
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.rules.skeletons import build_skeleton, skeleton_names
from hybrimoe_kt.operators.norm import FusedRMSNorm
from hybrimoe_kt.operators.rotary import FusedRotary, Rotate, RotatePairs
from hybrimoe_kt.operators.router import FusedRouter

CONTRACT = ("a.module", None, None)
FAMILIES = skeleton_names()
ROUTED = [family for family in FAMILIES if family not in ("gemma4", "hunyuan-moe", "afmoe", "llama4")]
"""Whose routers are a matrix and a choice; the others' rules leave theirs alone."""
TURNED = [
    family
    for family in FAMILIES
    if family
    not in (
        "deepseek2",
        "deepseek32",
        "deepseek4",
        "glm-dsa",
        "gemma4",
        "gpt-oss",
        "nemotron_h_moe",
        "granitehybrid",
        "llama4",
        "kimi-linear",
        "bailingmoe3",
        "cohere2moe",
    )
]
"""Whose attention turns queries and keys in one call, by cosines and sines of a head's width."""


def of_kind(family: str, ending: str) -> nn.Module:
    """The family's first module whose class ends so, with random values, in float32."""
    model = build_skeleton(family)
    found = next(m for m in model.modules() if type(m).__name__.lower().endswith(ending))
    made: Any = copy.deepcopy(found).to_empty(device="cpu").float()
    random = torch.Generator().manual_seed(1)
    for value in (*made.parameters(), *made.buffers()):
        value.data = torch.randn(value.shape, generator=random) / 3
    return made


def further(router: Any) -> tuple[torch.Tensor, ...]:
    """What some are given besides: MiniMax's its correction."""
    extra = len(inspect.signature(router.forward).parameters) - 1
    return tuple(torch.randn(len(router.weight), generator=torch.Generator().manual_seed(2)) for _ in range(extra))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_is_the_stock_one_on_a_cpu(family: str, dtype: torch.dtype) -> None:
    stock = of_kind(family, "rmsnorm").to(dtype)
    x = torch.randn(5, 3, len(stock.weight), generator=torch.Generator().manual_seed(3)).to(dtype)
    wanted = stock(x)
    ours = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock))
    assert torch.equal(ours(x), wanted)
    assert isinstance(ours, type(stock))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert torch.equal(copy.deepcopy(ours)(x), wanted)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen4exp"])  # whose first has groups
def test_a_norm_by_the_kernel(family: str) -> None:
    pytest.importorskip("triton")
    stock = of_kind(family, "rmsnorm").half()
    x = torch.randn(5, len(stock.weight), generator=torch.Generator().manual_seed(3)).half()
    ours = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock), kernel="triton")
    ours(x)  # asks
    launches = Launches()
    with launches.of("norm"), launches.counting():
        found = ours(x)
    assert launches.kernels == {("norm", "rms_norm_kernel"): 1}
    torch.testing.assert_close(found, stock(x), rtol=2e-3, atol=1e-5)


def test_a_norm_of_groups_is_the_stock_one_beside_others_of_its_class() -> None:
    pytest.importorskip("triton")
    model = build_skeleton("qwen4exp")
    norms = [module for module in model.modules() if type(module).__name__ == "Qwen4ExpTextRMSNorm"]
    assert {bool(norm.group_size) for norm in norms} == {True, False}
    for stock in sorted(norms, key=lambda norm: bool(norm.group_size)):
        stock = copy.deepcopy(stock).to_empty(device="cpu").half()
        stock.weight.data = torch.randn(stock.weight.shape, generator=torch.Generator().manual_seed(1)).half() / 3
        x = torch.randn(5, len(stock.weight), generator=torch.Generator().manual_seed(3)).half()
        found = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock), kernel="triton")(x)
        torch.testing.assert_close(found, stock(x), rtol=2e-3, atol=1e-5)


def test_what_no_kernel_is_for_stays_the_stock_module() -> None:
    """A norm with a bias, of another kind, or of rows at odd places."""
    other = nn.LayerNorm(16)
    x = torch.randn(2, 16)
    assert torch.equal(FusedRMSNorm(*CONTRACT, copy.deepcopy(other), kernel="triton")(x), other(x))
    stock = of_kind("qwen3moe", "rmsnorm")
    ours, odd = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock), kernel="triton"), len(stock.weight)
    x = torch.randn(3, odd + 3)[:, :odd]
    assert torch.equal(ours(x), stock(x))
    with pytest.raises(ConfigError, match="replaces a norm, found Linear"):
        FusedRMSNorm(*CONTRACT, nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="replaces a top-k router, found Linear"):
        FusedRouter(*CONTRACT, nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="replaces a rotary embedding, found Linear"):
        FusedRotary(*CONTRACT, nn.Linear(2, 2))
    for operator in (FusedRMSNorm, FusedRouter, FusedRotary):
        with pytest.raises(ConfigError, match="unknown kernel"):
            operator.check_kwargs({"kernel": "tritium"})


@pytest.mark.parametrize("family", ROUTED)
def test_a_router_is_the_stock_one_on_a_cpu(family: str) -> None:
    stock: Any = of_kind(family, "topkrouter")
    hidden = torch.randn(7, stock.weight.shape[1], generator=torch.Generator().manual_seed(3))
    ours = FusedRouter(*CONTRACT, copy.deepcopy(stock))
    for found, wanted in zip(ours(hidden, *further(stock)), stock(hidden, *further(stock)), strict=True):
        assert torch.equal(found, wanted)
    assert isinstance(ours, type(stock)) and ours.probabilities is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "family", [family for family in ROUTED if family not in ("hy_v3", "deepseek4")]
)  # which stay Transformers' own
def test_a_router_by_the_kernel(family: str, dtype: torch.dtype) -> None:
    """Ids in another order are the same choice; weights come as float32, rounded to the stock module's dtype."""
    pytest.importorskip("triton")
    stock: Any = of_kind(family, "topkrouter").to(dtype)
    hidden = torch.randn(3, stock.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    inputs = further(stock)
    ours = FusedRouter(*CONTRACT, copy.deepcopy(stock), kernel="triton")
    logits, weights, ids = ours(hidden, *inputs)
    wanted_logits, wanted_weights, wanted_ids = stock(hidden, *inputs)
    torch.testing.assert_close(logits.float(), wanted_logits.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(ids.sort().values, wanted_ids.sort().values)
    spread = [
        torch.zeros(logits.shape).scatter_(1, i, w.float()) for i, w in ((ids, weights), (wanted_ids, wanted_weights))
    ]
    step = 1e-5 if wanted_weights.dtype == torch.float32 else 2.0**-7  # cut, not rounded, in the interpreter
    torch.testing.assert_close(*spread, rtol=step, atol=1e-7)
    assert weights.dtype == torch.float32 and torch.equal(weights, weights.to(wanted_weights.dtype).float())
    assert ours.probabilities is not None
    torch.testing.assert_close(ours.probabilities, logits.float().softmax(-1))


def test_a_router_that_answers_in_another_order_stays_the_stock_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite's did up to Transformers 5.20; and one that weights in no way known here."""
    stock: Any = of_kind("granitemoe", "topkrouter")
    hidden, kind = torch.randn(3, stock.weight.shape[1], generator=torch.Generator().manual_seed(3)), type(stock)
    own = kind.forward
    changes = {
        "another order": lambda self, given: own(self, given)[::-1],
        "other weights": lambda self, given: (*own(self, given)[:1], own(self, given)[1] ** 2, own(self, given)[2]),
    }
    for name, forward in changes.items():
        monkeypatch.setattr(kind, "forward", forward)
        copied = copy.deepcopy(stock)
        copied.name = name  # what is known of a router is known by its attributes
        ours = FusedRouter(*CONTRACT, copied, kernel="triton")
        assert all(map(torch.equal, ours(hidden), stock(hidden)))


@pytest.mark.parametrize("family", TURNED)
def test_heads_are_turned_as_the_family_turns_them(family: str) -> None:
    """In one launch, where it is asked for; attention finds it under the name it always called."""
    pytest.importorskip("triton")
    model: Any = build_skeleton(family)
    attention = next(module for name, module in model.named_modules() if name.endswith("self_attn"))
    home = importlib.import_module(type(attention).__module__)
    stock = getattr(home, "apply_rotary_pos_emb_interleave", home.apply_rotary_pos_emb)
    random = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 4, heads, 32, generator=random).half().transpose(1, 2) for heads in (6, 2))
    angles = torch.randn(1, 4, 16, generator=random).repeat(1, 1, 2)
    cos, sin = angles.cos().half(), angles.sin().half()
    wanted = stock(query, key, cos, sin)
    for kernel in ("torch", "auto"):
        assert all(map(torch.equal, Rotate(stock, kernel)(query, key, cos, sin), wanted))
    by_kernel, launches = Rotate(stock, "triton"), Launches()
    by_kernel(query, key, cos, sin)  # asks
    with launches.of("rotary"), launches.counting():
        found = by_kernel(query, key, cos, sin)
    assert launches.kernels == {("rotary", "rotate_heads_kernel"): 1}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-10, atol=1e-4)


def test_an_attentions_own_forward_calls_the_launch_and_no_others_does() -> None:
    model: Any = build_skeleton("qwen3moe")
    first, second = (model.model.layers[number].self_attn for number in (0, 1))
    rotary = FusedRotary(*CONTRACT, model.model.rotary_emb)
    assert rotary.serve(first) and not rotary.serve(nn.Linear(2, 2))
    called = inspect.unwrap(first.forward.__func__).__globals__["apply_rotary_pos_emb"]
    assert isinstance(called, Rotate)
    untouched = inspect.unwrap(second.forward.__func__).__globals__["apply_rotary_pos_emb"]
    assert untouched is called.stock
    assert inspect.signature(first.forward) == inspect.signature(second.forward)


def test_complex_angles_turn_neighbours() -> None:
    pytest.importorskip("triton")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb

    random = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, heads, 3, 16, generator=random).half() for heads in (4, 1))
    phases = torch.randn(1, 3, 8, generator=random)
    angles = torch.polar(torch.ones_like(phases), phases)
    wanted = apply_rotary_emb(query, key, angles)
    for kernel in ("auto", "triton"):
        for one, other in zip(RotatePairs(apply_rotary_emb, kernel)(query, key, angles), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=2.0**-10, atol=1e-4)


def test_a_kernel_that_cannot_be_built_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C compiler")

    pytest.importorskip("triton")
    stock = of_kind("qwen3moe", "rmsnorm")
    ours, x = FusedRMSNorm(*CONTRACT, copy.deepcopy(stock), kernel="triton"), torch.randn(2, len(stock.weight))
    row_kernels._can_launch.cache_clear()
    monkeypatch.setattr(row_kernels, "norm", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(ours(x), stock(x))
    row_kernels._can_launch.cache_clear()
    assert [record.message for record in caplog.records] == [
        "norms, rotations and routers stay torch's on cpu, as kernels cannot be built: RuntimeError: no C compiler"
    ]
