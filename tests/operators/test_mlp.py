"""`FusedMLP`: the stock module's bits on a CPU, its values with one launch fewer where kernels multiply."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.launches import Launches
from hybrimoe_kt.device.packed import PackedWeight
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.hf.dense_upload import DenseOnAccelerators
from hybrimoe_kt.host.rules.skeletons import build_skeleton, skeleton_names
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.operators.mlp import FusedMLP
from tests.kernels.layers import DEVICE
from tests.support.packed import PackedLoader, packed_matrix
from tests.support.random_blocks import Type

CONTRACT = ("model.layers.1.mlp.shared_experts", None, None)
HIDDEN, INTER = 64, 96
SHAPES = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
PLACE = "cuda:0" if DEVICE.type == "cuda" else "emulated:0"


def mlp_of(family: str) -> Any | None:
    """The family's first gated MLP, with random values; None where it has none."""
    found = (m for m in build_skeleton(family).modules() if all(hasattr(m, name) for name in (*SHAPES, "act_fn")))
    stock = next((m for m in found if isinstance(m.gate_proj, nn.Linear)), None)
    if stock is None:
        return None
    made: Any = copy.deepcopy(stock).to_empty(device="cpu").float()
    random = torch.Generator().manual_seed(1)
    for value in made.parameters():
        value.data = torch.randn(value.shape, generator=random) / value.shape[-1] ** 0.5
    return made


FAMILIES = [family for family in skeleton_names() if mlp_of(family) is not None]


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_stock_module_where_torch_multiplies(family: str, kernel: str) -> None:
    """Its last product is no packed weight's, so that nothing can be part of it."""
    stock: Any = mlp_of(family)
    x = torch.randn(1, 3, stock.gate_proj.in_features, generator=torch.Generator().manual_seed(3))
    ours: Any = FusedMLP(*CONTRACT, copy.deepcopy(stock), kernel=kernel)
    assert torch.equal(ours(x), stock(x))
    assert isinstance(ours, type(stock)) and ours.state_dict().keys() == stock.state_dict().keys()
    is_other = family in ("gemma4", "deepseek4")  # GELU; clamped
    assert ours._is_swiglu() != is_other, "known, and so named by its rules"


def test_the_families_with_shared_experts_are_among_them() -> None:
    assert {"deepseek2", "deepseek3", "glm4moe", "qwen2moe", "qwen3next"} <= set(FAMILIES)


class _Mlp(nn.Module):
    """Like a family's, of packed weights."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False))
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Tanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


def packed(act_fn: nn.Module, kernel: str) -> Any:
    """On an emulated accelerator, whose products are Triton's."""
    parts = {name: packed_matrix(Type.Q8_0, *shape, seed=n)[0] for n, (name, shape) in enumerate(SHAPES.items())}
    loader = PackedLoader({f"{name}.weight": PackedWeight((part,)) for name, part in parts.items()})
    module: Any = FusedMLP(*CONTRACT, _Mlp(act_fn), kernel=kernel)
    for name in SHAPES:
        linear = QuantizedLinear(name, loader, None, getattr(module, name), generate_device=PLACE, gpu="triton")
        setattr(module, name, linear)
    DenseOnAccelerators(module).load(torch.float16, progress=False)
    return module.to(DEVICE)


@pytest.mark.kernels
@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_the_activation_is_part_of_the_last_product(tokens: int) -> None:
    pytest.importorskip("triton")
    x = torch.randn(1, tokens, HIDDEN, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    counted, answers = [], []
    for kernel in ("torch", "triton"):
        module, launches = packed(nn.SiLU(), kernel), Launches()
        module(x)  # asks
        with launches.of("mlp"), launches.counting():
            answers.append(module(x))
        counted.append({name: number for (_, name), number in launches.kernels.items()})
    torch.testing.assert_close(answers[1], answers[0], rtol=2e-3, atol=2e-3)
    torchs = {"silu": 1, "mul": 1}
    assert torchs.items() <= counted[0].items()
    if tokens <= 8:
        assert counted[0] == counted[1] | torchs and not torchs.keys() & counted[1].keys()


@pytest.mark.kernels
def test_another_activation_stays_the_stock_module() -> None:
    pytest.importorskip("triton")
    module = packed(_Tanh(), "triton")
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    assert torch.equal(module(x), module.down_proj(module.gate_proj(x).tanh() * module.up_proj(x)))
    assert not module._is_swiglu()


@pytest.mark.parametrize("limit", [0.0, 0.5, 16.0, 100.0])
def test_a_clamped_one_is_told_from_another_of_its_class(limit: float) -> None:
    """Step's, which clamps in some layers."""
    from transformers import AutoConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP

    limits = {"swiglu_limits_shared": [limit]}
    config = AutoConfig.for_model("step3p5", hidden_size=64, share_expert_dim=96, num_hidden_layers=1, **limits)
    assert FusedMLP(*CONTRACT, Step3p7MLP(config, 0, is_shared_expert=True))._is_swiglu() == (limit == 0)


def test_what_it_does_not_replace_is_told() -> None:
    with pytest.raises(ConfigError, match="FusedMLP replaces a gated MLP, found Linear"):
        FusedMLP(*CONTRACT, nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="unknown kernel"):
        FusedMLP.check_kwargs({"kernel": "tritium"})
