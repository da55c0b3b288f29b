"""Every kernel against its naive form, which takes dequantised weights; in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hybrimoe_kt.backends.gpu_triton import target_of
from hybrimoe_kt.kernels.combine_pairs import combine_pairs, naive_combine_pairs
from hybrimoe_kt.kernels.configs import (
    combine_config,
    decode_config,
    max_blocks,
    prefill_config,
    prefill_configs,
    quantize_config,
    sort_config,
)
from hybrimoe_kt.kernels.decode_down import decode_down, naive_decode_down
from hybrimoe_kt.kernels.decode_gate_up import decode_gate_up, naive_decode_gate_up
from hybrimoe_kt.kernels.prefill_down import naive_prefill_down, prefill_down
from hybrimoe_kt.kernels.prefill_gate_up import naive_prefill_gate_up, prefill_gate_up
from hybrimoe_kt.kernels.quantize_rows import naive_quantize_rows, quantize_rows
from hybrimoe_kt.kernels.sort_pairs import naive_sort_pairs, sort_pairs
from hybrimoe_kt.kernels.tables import code_words
from hybrimoe_kt.kernels.targets import TARGETS
from tests.kernels.layers import BLOCKS_OF_32, DEVICE, KINDS, relative_error, routed, slotted_layer
from tests.support.random_blocks import Type

pytestmark = pytest.mark.kernels

TARGET, TABLES = target_of(DEVICE), code_words(DEVICE)
NAN = float("nan")
INT8_ERROR, HALF_ERROR = 2e-2, 1e-3

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.shape[1] % 32:  # float weights, which do not look at them
        return (
            torch.empty(1, dtype=torch.int32, device=DEVICE),
            torch.empty(1, device=DEVICE),
            torch.empty(1, device=DEVICE),
        )
    quants, scales, sums = (part.to(DEVICE) for part in naive_quantize_rows(x.cpu()))
    return quants.view(torch.int32), scales, sums


@pytest.mark.parametrize("shape", [(1, 32), (3, 352), (7, 2048)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_quantize_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    x[0, :32] = 0
    blocks = (shape[0], shape[1] // 32)
    quants = torch.full(shape, 99, dtype=torch.int8, device=DEVICE)
    scales, sums = torch.full(blocks, NAN, device=DEVICE), torch.full(blocks, NAN, device=DEVICE)
    quantize_rows(x, quants.view(torch.int32), scales, sums, quantize_config(TARGET))
    wanted_quants, wanted_scales, wanted_sums = naive_quantize_rows(x.cpu())
    torch.testing.assert_close(scales.cpu(), wanted_scales)
    assert (quants.cpu().int() - wanted_quants.int()).abs().max() <= 1, "rounding at .5 may differ by the division"
    assert (quants.cpu() != wanted_quants).float().mean() < 1e-3
    torch.testing.assert_close(sums.cpu(), scales.cpu() * quants.cpu().float().unflatten(1, (-1, 32)).sum(2))
    torch.testing.assert_close(sums.cpu(), wanted_sums, rtol=1e-3, atol=float(wanted_scales.max()))


@pytest.mark.parametrize("shape", [(2, 32), (3, 352)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_quantize_rows_of_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Two parts of the rows that a product of two matrices writes."""
    tokens, width = shape
    both = torch.randn(tokens, 2 * width + 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    both[0, :32] = 0
    gate, up = (part.to(DEVICE)[:, first : first + width] for part in (both,) for first in (0, width + 8))
    quants = torch.full(shape, 99, dtype=torch.int8, device=DEVICE)
    scales, sums = (torch.full((tokens, width // 32), NAN, device=DEVICE) for _ in range(2))
    quantize_rows(gate, quants.view(torch.int32), scales, sums, quantize_config(TARGET), up=up)
    _, wanted_scales, _ = naive_quantize_rows(both[:, :width], both[:, width + 8 :])
    is_cut = TARGET.interpreted and dtype == torch.bfloat16  # which the interpreter does not round
    step = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}[dtype] * (1 + 3 * is_cut)
    torch.testing.assert_close(scales.cpu(), wanted_scales, rtol=step, atol=0)
    values = (quants.cpu().float().unflatten(1, (-1, 32)) * scales.cpu()[..., None]).flatten(1)
    exact = torch.nn.functional.silu(both[:, :width].float()) * both[:, width + 8 :].float()
    assert relative_error(values, exact) < INT8_ERROR
    torch.testing.assert_close(sums.cpu(), scales.cpu() * quants.cpu().float().unflatten(1, (-1, 32)).sum(2))


@each_kind
def test_decode_gate_up(kind: Type) -> None:
    layer = slotted_layer(kind)
    hidden, ids, _ = routed(layer, 3, torch.float16)
    act = torch.full((ids.numel(), layer.experts.inter), NAN, device=DEVICE)
    pair_slot = torch.full((ids.numel(),), 77, dtype=torch.int32, device=DEVICE)
    gate, up, _ = layer.layout.matrices
    config = decode_config(TARGET)
    decode_gate_up(
        layer.memory, TABLES, gate, up, layer.slot_of, ids, hidden, quantized(hidden), act, pair_slot, config
    )
    present = {expert: layer.matrices(expert)[:2] for expert, _ in layer.slots}
    wanted = naive_decode_gate_up(hidden.cpu(), ids.cpu(), present, layer.experts.inter)
    assert relative_error(act, wanted) < (INT8_ERROR if kind not in (Type.F16, Type.BF16) else HALF_ERROR)
    assert torch.equal(act.cpu() == 0, wanted == 0), "pairs without a slot are zeros"
    flat = ids.cpu().flatten()
    assert torch.equal(pair_slot.cpu(), torch.where(flat >= 0, layer.slot_of.cpu()[flat.clamp_min(0)], -1))


@each_kind
def test_decode_gate_up_is_exact_on_what_it_is_given(kind: Type) -> None:
    """Apart from rounding activations to int8 nothing is lost: against dequantised activations, 1e-5."""
    layer = slotted_layer(kind)
    hidden, ids, _ = routed(layer, 1)
    quants, scales, sums = quantized(hidden)
    rounded = hidden
    if kind not in (Type.F16, Type.BF16):
        rounded = (quants.view(torch.int8).float().unflatten(1, (-1, 32)) * scales[:, :, None]).flatten(1)
    act = torch.full((ids.numel(), layer.experts.inter), NAN, device=DEVICE)
    pair_slot = torch.full((ids.numel(),), 77, dtype=torch.int32, device=DEVICE)
    ids[0] = torch.tensor([0, 4])
    gate, up, _ = layer.layout.matrices
    config = decode_config(TARGET)
    decode_gate_up(
        layer.memory, TABLES, gate, up, layer.slot_of, ids, rounded, (quants, scales, sums), act, pair_slot, config
    )
    present = {expert: layer.matrices(expert)[:2] for expert, _ in layer.slots}
    wanted = naive_decode_gate_up(rounded.cpu(), ids.cpu(), present, layer.experts.inter)
    assert relative_error(act, wanted) < 1e-5


@each_kind
def test_decode_down(kind: Type) -> None:
    layer = slotted_layer(kind)
    _, ids, weights = routed(layer, 3)
    act = torch.randn(ids.numel(), layer.experts.inter, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    flat = ids.flatten()
    pair_slot = torch.where(flat >= 0, layer.slot_of[flat.clamp_min(0)], -1).to(torch.int32)
    act[pair_slot < 0] = NAN
    before = torch.randn(3, layer.experts.hidden, generator=torch.Generator().manual_seed(3))
    out, fresh = before.to(DEVICE).clone(), torch.full(before.shape, NAN, device=DEVICE)
    down = layer.layout.matrices[2]
    clean = torch.nan_to_num(act)
    given = layer.memory, TABLES, down, pair_slot, weights, act, quantized(clean)
    decode_down(*given, out, decode_config(TARGET))
    decode_down(*given, fresh, decode_config(TARGET), clears=True)
    wanted = naive_decode_down(
        clean.cpu(), ids.cpu(), weights.cpu(), {expert: layer.matrices(expert)[2] for expert, _ in layer.slots}
    )
    error = relative_error(out.cpu() - before, wanted)
    assert error < (INT8_ERROR if kind not in (Type.F16, Type.BF16) else HALF_ERROR)
    torch.testing.assert_close(out.cpu(), before + fresh.cpu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 17, 700])
@pytest.mark.parametrize("block", [16, 64])
def test_sort_pairs(num_tokens: int, block: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    num_experts, top_k = 7, 3
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k].contiguous()
    ids[num_tokens // 2, 1] = -1
    ids[ids == 5] = 2  # an expert nobody uses
    slot_of = torch.tensor([3, -1, 0, 9, 2, 1, 4], dtype=torch.int32)
    num_blocks = max_blocks(ids.numel(), num_experts, block)
    pairs = torch.full((num_blocks * block,), -77, dtype=torch.int32, device=DEVICE)
    slots = torch.full((num_blocks,), -77, dtype=torch.int32, device=DEVICE)
    sort_pairs(ids.to(DEVICE), slot_of.to(DEVICE), pairs, slots, block, sort_config(TARGET))
    wanted_pairs, wanted_slots = naive_sort_pairs(ids, slot_of, block, num_blocks)
    assert torch.equal(slots.cpu(), wanted_slots), "poison is overwritten in every block, needed or not"
    used = wanted_slots.repeat_interleave(block) >= 0
    assert torch.equal(pairs.cpu()[used], wanted_pairs[used])


def test_blocks_suffice_for_the_worst_routing() -> None:
    """Every expert one pair more than full blocks."""
    num_experts, block = 5, 16
    ids = torch.arange(num_experts).repeat(block + 1)[:, None]
    num_blocks = max_blocks(ids.numel(), num_experts, block)
    _, slots = naive_sort_pairs(ids, torch.arange(num_experts, dtype=torch.int32), block, num_blocks)
    assert int((slots >= 0).sum()) == 2 * num_experts <= num_blocks


@each_kind
def test_prefill(kind: Type) -> None:
    layer = slotted_layer(kind)
    experts, config = layer.experts, prefill_config(TARGET, 1)
    hidden, ids, _ = routed(layer, 17, torch.float16)
    num_blocks = max_blocks(ids.numel(), experts.num_experts, config.pairs)
    sorted_pairs = naive_sort_pairs(ids.cpu(), layer.slot_of.cpu(), config.pairs, num_blocks)
    pairs, slots = (part.to(DEVICE) for part in sorted_pairs)
    gate, up, down = layer.layout.matrices
    by_slot = {slot: layer.matrices(expert) for expert, slot in layer.slots}
    present = torch.zeros(ids.numel(), dtype=torch.bool)
    present[sorted_pairs[0][sorted_pairs[0] >= 0].long()] = True

    act = torch.full((ids.numel(), experts.inter), NAN, dtype=torch.float16, device=DEVICE)
    prefill_gate_up(layer.memory, TABLES, gate, up, pairs, slots, experts.top_k, hidden, act, config)
    wanted = torch.full(act.shape, NAN)
    gate_ups = {slot: matrices[:2] for slot, matrices in by_slot.items()}
    naive_prefill_gate_up(hidden.cpu(), *sorted_pairs, experts.top_k, gate_ups, wanted)
    assert relative_error(act.cpu()[present], wanted[present]) < HALF_ERROR
    assert act.cpu()[~present].isnan().all(), "pairs without a slot are left alone"

    answers = torch.full((ids.numel(), experts.hidden), NAN, device=DEVICE)
    prefill_down(layer.memory, TABLES, down, pairs, slots, act, answers, config)
    wanted = torch.full(answers.shape, NAN)
    naive_prefill_down(act.cpu(), *sorted_pairs, {slot: m[2] for slot, m in by_slot.items()}, wanted)
    assert relative_error(answers.cpu()[present], wanted[present]) < HALF_ERROR
    assert answers.cpu()[~present].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_prefill_cuts_values_to_the_range_of_half() -> None:
    layer = slotted_layer(Type.F16)
    experts, config = layer.experts, prefill_config(TARGET, 1)
    hidden = torch.full((1, experts.hidden), 30000.0, dtype=torch.float16, device=DEVICE)
    pairs = torch.full((config.pairs,), -1, dtype=torch.int32, device=DEVICE)
    pairs[0] = 0
    slots = layer.slot_of[:1].clone()
    act = torch.full((1, experts.inter), NAN, dtype=torch.float16, device=DEVICE)
    gate, up, _ = layer.layout.matrices
    prefill_gate_up(layer.memory, TABLES, gate, up, pairs, slots, 1, hidden, act, config)
    assert act.isfinite().all()
    assert (act.abs() == 65504).any()


@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 264), (33, 520)])
def test_combine_pairs(num_tokens: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(-1, 4, (num_tokens, 3), generator=generator)
    slot_of = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    answers = torch.randn(ids.numel(), hidden, generator=generator)
    flat = ids.flatten()
    answers[(flat < 0) | (slot_of[flat.clamp_min(0)] < 0)] = NAN
    weights, before = torch.rand(ids.shape, generator=generator), torch.randn(num_tokens, hidden, generator=generator)
    out = before.to(DEVICE).clone()
    arguments = (answers.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE), slot_of.to(DEVICE))
    combine_pairs(*arguments, out, combine_config(TARGET))
    wanted = before + naive_combine_pairs(answers, ids, weights, slot_of)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_the_oddest_shapes_are_no_multiples() -> None:
    """The tests above would pass more easily on multiples of 64."""
    shapes = {(slotted_layer(kind).experts.hidden, slotted_layer(kind).experts.inter) for kind in BLOCKS_OF_32}
    assert shapes == {(352, 96)}


def test_the_larger_block_is_for_many_tokens_of_one_type() -> None:
    target = TARGETS["sm_90"]
    small, large = prefill_configs(target)
    assert small.pairs < large.pairs
    assert (prefill_config(target, 47.9), prefill_config(target, 48)) == (small, large)
    mixed = prefill_config(target, 500, one_type=False)
    assert (mixed.pairs, mixed.num_stages) == (small.pairs, 1)
    only = prefill_configs(TARGETS["sm_86"])
    assert [prefill_config(TARGETS["sm_86"], 500)] == list(only)
