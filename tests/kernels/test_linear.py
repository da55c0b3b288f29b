"""Linear layers' kernels against their naive forms, and the door to them; in the interpreter, or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from gguf.quants import dequantize

pytest.importorskip("triton")

from hybrimoe_kt.backends.gpu_triton import target_of
from hybrimoe_kt.device.layout import MatrixLayout
from hybrimoe_kt.kernels.configs import few_config, few_configs, many_config, many_configs
from hybrimoe_kt.kernels.linear import LinearKernels
from hybrimoe_kt.kernels.linear_few import linear_few, naive_linear_few
from hybrimoe_kt.kernels.linear_many import linear_many, naive_linear_many
from hybrimoe_kt.kernels.quantize_rows import naive_quantize_rows
from hybrimoe_kt.kernels.tables import code_words
from hybrimoe_kt.kernels.targets import TARGETS
from hybrimoe_kt.kernels.workspace import CHUNK_TOKENS, Workspace
from hybrimoe_kt.quants import TYPES
from tests.kernels.layers import DEVICE, KINDS, relative_error
from tests.support.random_blocks import Type, random_blocks

pytestmark = pytest.mark.kernels

INTERPRETED = pytest.mark.slow_interpreted
TARGET, TABLES = target_of(DEVICE), code_words(DEVICE)
NAN = float("nan")
INT8_ERROR, HALF_ERROR = 2e-2, 1e-3
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
F16, BF16, Q8_0, Q4_K, Q6_K = Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K, Type.Q6_K

QUICK = (F16, Q8_0, Q4_K, Q6_K, Type.IQ2_XS, Type.MXFP4)
"""Of each kind one: experts' kernels, which unpack by the same code, are tried with all in `test_ops.py`."""
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else INTERPRETED, id=kind.name) for kind in KINDS]
)
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=["fp32", "fp16", "bf16"])


@dataclass
class Linears:
    """Random matrices laid out in memory that is poisoned before, between and behind them."""

    memory: torch.Tensor
    matrices: tuple[MatrixLayout, ...]
    values: list[torch.Tensor]
    """Dequantised by gguf-py, float32 `[rows, columns]`."""

    def wanted(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = x.cpu() if x.dim() == 3 else x.cpu()[:, None]
        return naive_linear_few(x, self.values, None if bias is None else bias.cpu())


def linears(*shapes: tuple[Type, int], columns: int) -> Linears:
    """A matrix for each (type, rows)."""
    random = np.random.default_rng([columns, *(int(kind) + rows for kind, rows in shapes)])
    at, layouts, values, parts = 256, [], [], []
    for kind, rows in shapes:
        raw = random_blocks(random, kind, rows, columns)
        layouts.append(MatrixLayout.at(at, int(kind), rows, columns))
        values.append(torch.from_numpy(np.array(dequantize(raw, kind), dtype=np.float32)).view(rows, columns))
        parts.append(torch.from_numpy(raw.reshape(-1)))
        at = layouts[-1].end_bytes + 128
    memory = torch.full((at,), 0xFF, dtype=torch.uint8)
    for layout, part in zip(layouts, parts, strict=True):
        layout.write(part, memory)
    return Linears(memory.to(DEVICE), tuple(layouts), values)


def odd_columns(*kinds: Type) -> int:
    """The oddest legal number of columns: an odd multiple of every type's block."""
    return {8: 264, 32: 352, 256: 768}[max(TYPES[kind].column_step for kind in kinds)]


def random_x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).to(DEVICE)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if x.shape[-1] % 32:  # float weights, which do not look at them
        return TABLES, TABLES, TABLES
    quants, scales, sums = (part.to(DEVICE) for part in naive_quantize_rows(x.cpu().flatten(0, -2)))
    return quants.view(torch.int32), scales, sums


def kernels(given: Linears, heads: int = 1, bias: torch.Tensor | None = None) -> LinearKernels:
    return LinearKernels(TARGET, given.memory, TABLES, given.matrices, heads, bias)


def multiplied(layer: LinearKernels, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The product, by way of a poisoned workspace, between guards that must stay."""
    size = x.shape[0] * layer.total_rows
    guarded = torch.full((size + 64,), NAN, dtype=dtype, device=DEVICE)
    space = Workspace(layer.workspace_bytes(x.shape[0], x.dtype), DEVICE)
    space.memory.fill_(0xFF)
    layer.multiply(space, x, guarded[32 : 32 + size].view(-1, layer.total_rows))
    assert guarded[:32].isnan().all() and guarded[32 + size :].isnan().all(), "written beside the output"
    return guarded[32 : 32 + size].view(-1, layer.total_rows)


def bound(kinds: Sequence[Type], num_tokens: int) -> float:
    rounds = num_tokens <= 8 and any(kind not in (F16, BF16) for kind in kinds)
    return INT8_ERROR if rounds else HALF_ERROR


@each_kind
@pytest.mark.parametrize("tokens", [pytest.param(1, marks=INTERPRETED), 4])
def test_few_in_blocks_that_do_not_divide_anything(kind: Type, tokens: int) -> None:
    """25 rows in blocks of 16, 5 tokens in groups: exact but for the rounding of activations to int8."""
    given, x = linears((kind, 25), columns=odd_columns(kind)), random_x(5, 1, odd_columns(kind))
    out = torch.full((5, 25), NAN, device=DEVICE)
    rows, config = quantized(x), replace(few_configs(TARGET)[0], rows=16, tokens=tokens)
    rounded = x
    if kind not in (F16, BF16):
        rounded = (rows[0].view(torch.int8).float().unflatten(1, (-1, 32)) * rows[1][:, :, None]).view(x.shape)
    linear_few(given.memory, TABLES, given.matrices, 1, x, rows, None, out, config)
    assert relative_error(out, given.wanted(rounded)) < 1e-5


@each_kind
def test_many_in_blocks_that_do_not_divide_anything(kind: Type) -> None:
    given, x = linears((kind, 75), columns=odd_columns(kind)), random_x(17, 1, odd_columns(kind), dtype=torch.float16)
    out = torch.full((17, 75), NAN, device=DEVICE)
    config = replace(many_configs(TARGET)[0], rows=64)
    linear_many(given.memory, TABLES, given.matrices[0], 1, x, None, out, config)
    assert relative_error(out, naive_linear_many(x.cpu(), given.values[0])) < HALF_ERROR


@pytest.mark.parametrize("num_tokens", [1, 8, 9, *(pytest.param(num, marks=INTERPRETED) for num in (2, 5, 33))])
@pytest.mark.parametrize("kinds", [(Q4_K,), (Q4_K, Q6_K), (Q8_0, Type.Q4_0, F16)], ids=len)
def test_groups_with_biases(kinds: tuple[Type, ...], num_tokens: int) -> None:
    """One, two and three matrices of different widths; their rows stand side by side."""
    shapes = list(zip(kinds, (43, 7, 22), strict=False))
    given = linears(*shapes, columns=odd_columns(*kinds))
    bias = random_x(sum(rows for _, rows in shapes))
    x = random_x(num_tokens, odd_columns(*kinds))
    found, wanted = multiplied(kernels(given, bias=bias), x).cpu(), given.wanted(x, bias)
    first = 0
    for kind, rows in shapes:
        part = slice(first, first + rows)
        assert relative_error(found[:, part], wanted[:, part]) < bound([kind], num_tokens)
        first += rows


@pytest.mark.parametrize("num_tokens", [1, 3, 9])
@pytest.mark.parametrize("kind", [Q8_0, Q4_K, F16], ids=lambda kind: kind.name)
def test_heads_have_inputs_of_their_own(kind: Type, num_tokens: int) -> None:
    """3 heads of 21 rows, no multiple of any program's."""
    columns = odd_columns(kind)
    given, bias = linears((kind, 63), columns=columns), random_x(63)
    x = random_x(num_tokens, 3, columns)
    assert relative_error(multiplied(kernels(given, 3, bias), x), given.wanted(x, bias)) < bound([kind], num_tokens)


def test_rows_of_a_head_end_within_a_block() -> None:
    given, x = linears((Q8_0, 63), columns=352), random_x(2, 3, 352)
    out = torch.full((2, 63), NAN, device=DEVICE)
    config = replace(few_configs(TARGET)[-1], rows=16)
    linear_few(given.memory, TABLES, given.matrices, 3, x, quantized(x), None, out, config)
    assert relative_error(out, given.wanted(x)) < INT8_ERROR
    given, x = linears((Q8_0, 225), columns=352), random_x(9, 3, 352, dtype=torch.float16)
    out = torch.full((9, 225), NAN, device=DEVICE)
    linear_many(given.memory, TABLES, given.matrices[0], 3, x, None, out, replace(many_configs(TARGET)[0], rows=64))
    assert relative_error(out, given.wanted(x)) < HALF_ERROR


@pytest.mark.parametrize("kinds", [(Q8_0,), (BF16, F16)], ids=["Q8_0", "BF16+F16"])
@pytest.mark.parametrize("num_tokens", [2, 9])
@each_dtype
def test_every_dtype_comes_in_and_goes_out(kinds: tuple[Type, ...], num_tokens: int, dtype: torch.dtype) -> None:
    given = linears(*((kind, 19) for kind in kinds), columns=odd_columns(*kinds))
    x = random_x(num_tokens, odd_columns(*kinds), dtype=dtype)
    layer, wanted = kernels(given), given.wanted(x)
    many = num_tokens > 8
    for answers in (torch.float32, dtype) if many else FLOATS:
        rounding = max(1.5 * torch.finfo(t).eps for t in ((answers, dtype) if many else (answers,)))
        error = relative_error(multiplied(layer, x, answers), wanted)
        assert error < max(rounding, bound(kinds, num_tokens))


@pytest.mark.parametrize("num_tokens", [5, 17])
def test_a_call_repeated_gives_the_same_bits(num_tokens: int) -> None:
    given, x = linears((Q4_K, 43), (Q6_K, 22), columns=768), random_x(num_tokens, 768)
    layer = kernels(given)
    assert torch.equal(multiplied(layer, x), multiplied(layer, x))


def test_a_token_alone_is_as_among_others() -> None:
    """Up to 8 tokens nothing depends on how many there are."""
    given, x = linears((Q4_K, 43), columns=768), random_x(5, 768)
    layer = kernels(given)
    assert torch.equal(multiplied(layer, x)[3:4], multiplied(layer, x[3:4].clone()))


def test_long_prompts_in_float32_pass_in_pieces() -> None:
    given, x = linears((F16, 8), columns=8), random_x(CHUNK_TOKENS + 5, 8)
    layer = kernels(given)
    layer = replace(layer, target=replace(TARGET, name="large")) if TARGET.interpreted else layer
    assert relative_error(multiplied(layer, x), given.wanted(x)) < HALF_ERROR


def test_the_workspace_is_enough_and_carved_once() -> None:
    layer = kernels(linears((Q8_0, 19), columns=352))
    assert layer.workspace_bytes(8, torch.float16) == 8 * 352 + 2 * -(-8 * 11 * 4 // 128) * 128
    assert layer.workspace_bytes(5000, torch.float16) == layer.workspace_bytes(8, torch.float16)
    assert layer.workspace_bytes(5000, torch.float32) == CHUNK_TOKENS * 352 * 2
    floats = kernels(linears((F16, 19), columns=264))
    assert floats.workspace_bytes(5000, torch.float16) == 0
    space = Workspace(layer.workspace_bytes(8, torch.float32), DEVICE)
    assert space.quantized(3, 352) is space.quantized(3, 352)


def test_what_kernels_cannot_do_is_refused() -> None:
    given = linears((Q8_0, 20), (F16, 7), columns=352)
    memory, (first, second) = given.memory, given.matrices
    huge = MatrixLayout.at(0, int(Type.BF16), 151_936, 8192)
    for matrices, heads, bias, said in (
        ((first, second), 4, None, "2 matrices with 4 heads"),
        ((first,) * 4, 1, None, "4 matrices with 1 heads"),
        ((first,), 3, None, "20 rows cannot be divided among 3 heads"),
        ((first, replace(second, columns=704)), 1, None, "has 704 columns, valid: the first's 352"),
        ((MatrixLayout.at(0, 12, 8, 128),), 1, None, "has 128 columns, valid: the first's 128, a multiple of 256"),
        ((MatrixLayout.at(0, 0, 8, 128),), 1, None, "no GPU kernel reads F32"),
        ((huge,), 1, None, "takes 2489319424 bytes; lay it out as two, some rows each"),
        ((MatrixLayout.at(0, 1, 1 << 24, 8),), 1, None, "1 x 8 inputs and 16777216 answers a token"),
        ((first,), 1, torch.zeros(19), "wanted contiguous float32 \\[20\\]"),
    ):
        with pytest.raises(ValueError, match=said):
            LinearKernels(TARGET, memory, TABLES, matrices, heads, bias)
    with pytest.raises(ValueError, match="memory must be contiguous uint8"):
        LinearKernels(TARGET, memory[1:], TABLES, (first,))


def test_a_matrix_may_begin_beyond_32_bits() -> None:
    """Memory that nothing is written to costs none, on the CPU."""
    given, x = linears((Q4_K, 19), columns=256), random_x(2, 256)
    (near,) = given.matrices
    far = MatrixLayout.at(1 << 31, 12, 19, 256)
    memory = torch.empty(far.end_bytes, dtype=torch.uint8, device=DEVICE)
    far.write(near.read(given.memory), memory)
    assert torch.equal(multiplied(LinearKernels(TARGET, memory, TABLES, (far,)), x), multiplied(kernels(given), x))


def test_three_types_are_not_multiplied_with_several_tokens() -> None:
    """Their code would spill; the reason is the gate's."""
    given = linears((Q8_0, 9), (Q4_K, 9), (Q6_K, 9), columns=768)
    assert {config.tokens for config in kernels(given)._few} == {1}
    two = Linears(given.memory, given.matrices[:2], given.values[:2])
    assert [config.tokens for config in kernels(two)._few] == [1] + [4] * 7


def test_shapes_are_chosen_by_rows_and_columns() -> None:
    target = TARGETS["sm_90"]  # 132 cores
    narrow, short, one, several = few_configs(target)
    for rows, units, num_tokens, wanted in (
        (1_000_000, 8, 8, short),
        (8, 16, 1, short),
        (1_000_000, 16, 2, several),  # half of the lanes idle, but for four tokens
        (4 * 32 * 132, 48, 1, short),  # two rounds, a quarter of them idle
        (4 * 32 * 132 - 1, 48, 1, one),
        (4 * 32 * 132, 49, 1, one),
        (32 * 132 - 1, 65, 1, narrow),
        (32 * 132, 65, 1, one),
        (8, 64, 1, one),  # too short for four warps
        (32 * 132 // 2 - 1, 65, 2, narrow),
        (32 * 132 // 2, 65, 2, several),
    ):
        assert few_config(target, rows, units, num_tokens) == wanted
    small, large = many_configs(target)
    assert (large.rows, large.pairs) == (128, 128)
    assert many_config(target, 1, 128 * 132, 9) == many_config(target, 33, 128, 4 * 128) == large
    assert many_config(target, 1, 128 * 131, 128) == many_config(target, 1, 576, 512) == small
    assert many_config(target, 128, 64, 512) == small, "a block of 128 rows would be half empty"
