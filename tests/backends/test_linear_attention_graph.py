"""Gated linear attention in ggml's graphs is Transformers' own, and both go on from each other's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Qwen3_5MoeTextConfig, Qwen3NextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from hybrimoe_kt.backends.ggml.dense_layer import DenseLayer, DenseMemory
from hybrimoe_kt.backends.ggml.parts import GatedLinear, LayerParts, Matrix, Norm, Swiglu
from hybrimoe_kt.backends.ggml.recurrent_state import RecurrentState
from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.host.hf.linear_parts import gated_linear
from hybrimoe_kt.host.hf.stock_weights import NotDescribed
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.operators.stored_state import StoredState

HIDDEN, WIDTH = 64, 16
FAMILIES = {
    "qwen3next": (Qwen3NextConfig, Qwen3NextGatedDeltaNet),
    "qwen35moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeGatedDeltaNet),
}
STEPS = {"one by one": (1,) * 80, "few": (7, 7, 7, 1, 2, 3), "many": (32, 32, 32, 1, 40, 1, 1)}


def packed(*parts: torch.Tensor) -> tuple[PackedMatrix, ...]:
    return tuple(PackedMatrix("blk", part.contiguous().view(torch.uint8).flatten(), 0, *part.shape) for part in parts)


def tiled(values: torch.Tensor, keys: int, width: int, dim: int = 0) -> torch.Tensor:
    """Value heads as Qwen3.5's files have them: the first of every key head, the second of every key head, ..."""
    return values.unflatten(dim, (keys, -1, width)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def as_in_a_file(module: Any, keys: int) -> dict[str, PackedWeight]:
    """What a converter makes of a module's matrices, and the order in which the model wants them."""

    def order(arrange: Callable[[torch.Tensor], torch.Tensor], number: int) -> torch.Tensor:
        return arrange(torch.arange(number)).argsort()

    if hasattr(module, "in_proj_qkvz"):
        heads, per_key = module.num_v_heads, module.num_v_heads // keys
        sizes = (WIDTH, WIDTH, per_key * WIDTH, per_key * WIDTH)

        def split(rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([part.flatten(0, 1) for part in rows.unflatten(0, (keys, -1)).split(sizes, dim=1)])

        weight = module.in_proj_qkvz.weight.detach()
        parts = packed(*split(weight).split(((2 * keys + heads) * WIDTH, heads * WIDTH)))
        return {
            "in_proj_qkvz": PackedWeight(parts, row_order=order(split, len(weight))),
            "in_proj_ba": PackedWeight(packed(module.in_proj_ba.weight.detach())),
            "out_proj": PackedWeight(packed(module.out_proj.weight.detach())),
        }

    def behind_keys(rows: torch.Tensor) -> torch.Tensor:
        both, values = rows.tensor_split((2 * module.key_dim,))
        return torch.cat((both, tiled(values, keys, WIDTH)))

    arranged: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "in_proj_qkv": behind_keys,
        "in_proj_z": lambda rows: tiled(rows, keys, WIDTH),
        "in_proj_b": lambda rows: tiled(rows, keys, 1),
    }  # in_proj_a stays floats, as a file may have it
    weights = {name: getattr(module, name).weight.detach() for name in arranged}
    made = {
        name: PackedWeight(packed(arrange(weights[name])), row_order=order(arrange, len(weights[name])))
        for name, arrange in arranged.items()
    }
    columns = tiled(torch.arange(module.value_dim), keys, WIDTH)
    return made | {"out_proj": PackedWeight(packed(module.out_proj.weight.detach()[:, columns]), column_order=columns)}


class Loader:
    """Gives a `QuantizedLinear` one packed weight."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight

    def packed_weight(self, name: str, shape: tuple[int, ...]) -> PackedWeight:
        assert shape == (self.weight.rows, self.weight.columns)
        return self.weight


class Case:
    """A module with random weights, what graphs make of it, and hidden states; norms around it do nothing."""

    def __init__(self, family: str, heads: tuple[int, int], *, is_packed: bool = False) -> None:
        torch.manual_seed(heads[0] * 7 + heads[1])
        config_class, module_class = FAMILIES[family]
        self.config = config_class(
            hidden_size=HIDDEN, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=heads[0], linear_num_value_heads=heads[1], linear_key_head_dim=WIDTH,
            linear_value_head_dim=WIDTH, linear_conv_kernel_dim=4,
        )  # fmt: skip
        self.module: Any = module_class(self.config, 0).eval()
        for name, parameter in self.module.named_parameters():
            if name != "A_log":
                nn.init.normal_(parameter, std=0.5 if "proj" not in name else 0.15)
        self.given = torch.randn(1, 200, HIDDEN)
        with torch.no_grad():
            self.wanted = self.module(self.normed(self.given))[0]
        if is_packed:
            for name, weight in as_in_a_file(self.module, heads[0]).items():
                linear = getattr(self.module, name)
                setattr(self.module, name, QuantizedLinear(f"layer.{name}", Loader(weight), self.config, linear))
        self.parts, layout = gated_linear(self.module)
        zeros = Matrix(packed(torch.zeros(HIDDEN, HIDDEN)))
        nothing = Norm(torch.ones(HIDDEN), 1e-6)
        self.dense = DenseLayer(
            LayerParts(nothing, self.parts, nothing, Swiglu(zeros, zeros, zeros)), DenseMemory(HIDDEN)
        )
        held = self.dense.new_held("f16")
        assert isinstance(held, RecurrentState)
        self.stored = StoredState(held, layout)
        self.cache = DynamicCache(config=self.config)
        self.cache.layers[0] = self.stored

    @staticmethod
    def normed(given: torch.Tensor) -> torch.Tensor:
        return given * torch.rsqrt(given.square().mean(-1, keepdim=True) + 1e-6)

    @torch.no_grad()
    def step(self, tokens: int, *, by_modules: bool = False) -> None:
        """Let the next tokens pass, and compare."""
        at = self.stored.held.length
        given, wanted = self.given[:, at : at + tokens], self.wanted[at : at + tokens]
        if by_modules:
            found = self.module(self.normed(given), self.cache)[0]
        else:
            memory = self.dense.memory.step(tokens)
            self.dense.begin(memory, at).copy_(given[0])
            found = self.dense.compute(self.stored.held, memory).residual - given[0]
        assert self.stored.held.length == at + tokens
        bound = 2e-5 * float(self.wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("is_packed", [False, True], ids=["floats", "file"])
@pytest.mark.parametrize("heads", [(2, 4), (2, 6), (3, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_those_of_the_whole(family: str, heads: tuple[int, int], is_packed: bool, steps: str) -> None:
    case = Case(family, heads, is_packed=is_packed)
    for tokens in STEPS[steps]:
        case.step(tokens)


@pytest.mark.parametrize("is_packed", [False, True], ids=["floats", "file"])
@pytest.mark.parametrize("heads", [(2, 4), (2, 6)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_and_modules_go_on_from_each_other(family: str, heads: tuple[int, int], is_packed: bool) -> None:
    case = Case(family, heads, is_packed=is_packed)
    for by_modules, steps in (
        (True, (40,)),
        (False, (1, 7)),
        (True, (2, 1)),
        (False, (32,)),
        (True, (33,)),
        (False, (1,)),
    ):
        for tokens in steps:
            case.step(tokens, by_modules=by_modules)


def test_a_conversation_begins_by_either() -> None:
    for first in (True, False):
        for tokens in (1, 2, 5):
            case = Case("qwen35moe", (2, 6), is_packed=True)
            case.step(tokens, by_modules=first)
            case.step(1, by_modules=not first)
            case.step(1, by_modules=first)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_is_what_the_stock_cache_holds(family: str) -> None:
    case, stock = Case(family, (2, 6), is_packed=True), DynamicCache(config=Case(family, (2, 6)).config)
    assert not case.cache.has_previous_state(0)
    assert not case.cache.is_croppable
    case.step(21)
    with torch.no_grad():
        case.module(case.normed(case.given[:, :21]), stock)
    wanted: Any = stock.layers[0]
    torch.testing.assert_close(case.stored.recurrent_states[0], wanted.recurrent_states[0], rtol=1e-4, atol=1e-5)
    assert case.cache.has_previous_state(0)
    case.cache.reset()
    assert not case.cache.has_previous_state(0)
    assert not any(region.memory.any() for region in case.stored.held.regions)
    case.step(3)


def test_a_conversation_that_begins_anew_is_not_the_old_one() -> None:
    case = Case("qwen3next", (2, 4))
    case.step(12)
    case.stored.reset()
    case.step(12)


def test_room_for_a_longer_step_keeps_what_is_held() -> None:
    case = Case("qwen3next", (2, 4))
    for tokens in (5, 60, 1, 90, 2):
        case.step(tokens)


def test_two_conversations_share_the_graphs() -> None:
    one, other = Case("qwen35moe", (2, 6)), Case("qwen35moe", (2, 6))
    other.dense = one.dense
    for case in (one, other, other, one, one, other):
        case.step(4)


def test_what_is_not_known_is_refused() -> None:
    case = Case("qwen3next", (2, 4))
    with pytest.raises(NotDescribed, match="Linear"):
        gated_linear(nn.Linear(2, 2))
    case.module.head_v_dim = 32
    with pytest.raises(NotDescribed, match="16 wide and its values 32"):
        gated_linear(case.module)
    case = Case("qwen35moe", (2, 6), is_packed=True)
    case.module.out_proj = nn.Linear(96, HIDDEN, bias=True)
    with pytest.raises(NotDescribed, match="out_proj has a bias"):
        gated_linear(case.module)
    case.module.out_proj = nn.Linear(96, HIDDEN, bias=False).double()
    with pytest.raises(NotDescribed, match="float64"):
        gated_linear(case.module)
    case = Case("qwen35moe", (2, 6), is_packed=True)
    case.module.in_proj_z = case.module.in_proj_qkv
    with pytest.raises(NotDescribed, match="unknown order"):
        gated_linear(case.module)


def test_parts_say_how_wide_the_convolution_is() -> None:
    parts: GatedLinear = Case("qwen3next", (2, 6)).parts
    assert parts.channels == parts.kernel.shape[1] == (2 * 2 + 6) * WIDTH
