"""Dense weights through the Triton kernels, as the operators call them: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("triton")

from hybrimoe_kt.backends.gpu_dense import DenseSpaces, product_of
from hybrimoe_kt.backends.gpu_up_projections import AcceleratorUpProjections
from hybrimoe_kt.device.dense_matrices import DenseMatrices
from hybrimoe_kt.device.packed import PackedWeight
from hybrimoe_kt.host.hf.dense_upload import DenseOnAccelerators
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.quants import kernel_types
from tests.kernels.layers import DEVICE, relative_error
from tests.support.packed import PackedLoader, packed_matrix
from tests.support.random_blocks import Type

pytestmark = pytest.mark.kernels

PLACE = "cuda:0" if DEVICE.type == "cuda" else "emulated:0"
DECODE, PREFILL = 2e-2, 1e-3
COLUMNS = 256
ROWS = (37, 8, 16)


def group(*kinds: Type) -> tuple[DenseMatrices, list[torch.Tensor]]:
    made = [
        packed_matrix(kind, rows, COLUMNS, seed=rows, name=str(rows)) for kind, rows in zip(kinds, ROWS, strict=False)
    ]
    matrices = DenseMatrices([PackedWeight((matrix,)) for matrix, _ in made])
    matrices.load(DEVICE)
    return matrices, [values.to(DEVICE) for _, values in made]


@pytest.mark.parametrize("kind", kernel_types(), ids=lambda kind: kind.name)
def test_every_type_alone(kind: object) -> None:
    matrices, (values,) = group(Type(kind.number))  # type: ignore[attr-defined]
    product = product_of(matrices, "triton", DenseSpaces())
    for tokens, within in ((1, DECODE), (12, PREFILL)):
        given = torch.randn(tokens, COLUMNS, device=DEVICE)
        assert relative_error(product(given), given @ values.t()) < within


@pytest.mark.parametrize(
    "kinds",
    [(Type.Q4_K, Type.Q4_K, Type.Q4_K), (Type.Q4_K, Type.Q4_K, Type.Q6_K), (Type.Q8_0, Type.F16, Type.Q4_0)],
    ids=lambda kinds: "+".join(kind.name for kind in kinds),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_of_one_input(kinds: tuple[Type, ...], dtype: torch.dtype) -> None:
    matrices, wanted = group(*kinds)
    biases = [torch.arange(float(ROWS[0]), device=DEVICE), None, torch.ones(ROWS[2], device=DEVICE)]
    product = product_of(matrices, "triton", DenseSpaces(), matrices.together(biases))
    for tokens, within in ((3, DECODE), (12, 2 * PREFILL)):
        given = torch.randn(tokens, COLUMNS, device=DEVICE).to(dtype)
        out = product(given)
        assert out.dtype == dtype
        for number, (values, bias) in enumerate(zip(wanted, biases, strict=True)):
            exact = functional.linear(given.float(), values, bias)
            assert relative_error(matrices.features(number, out).float(), exact) < within


@pytest.mark.parametrize("arithmetic", ["triton", "torch"])
@pytest.mark.parametrize("kinds", [(Type.Q8_0,), (Type.F16,), (Type.Q8_0, Type.F16)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_swiglu_in_front_of_a_product(tokens: int, kinds: tuple[Type, ...], arithmetic: str) -> None:
    """Of two parts of wider rows; the bits of silu, product and then the matrix, where these are three calls."""
    matrices, _ = group(*kinds)
    product = product_of(matrices, arithmetic, DenseSpaces(torch.float16))
    both = torch.randn(tokens, 2 * COLUMNS, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    gate, up = both.split(COLUMNS, dim=1)
    wanted = product((functional.silu(gate) * up).contiguous())
    found = product(gate, up)
    assert found.dtype == torch.float16 and found.shape == wanted.shape
    assert relative_error(found.float(), wanted.float()) < PREFILL


def test_a_group_of_more_types_than_a_launch_takes() -> None:
    kinds = (Type.Q8_0, Type.Q4_0, Type.F16, Type.Q4_K, Type.Q6_K)
    made = [packed_matrix(kind, 5 + seed, COLUMNS, seed=seed) for seed, kind in enumerate(kinds)]
    matrices = DenseMatrices([PackedWeight((matrix,)) for matrix, _ in made])
    matrices.load(DEVICE)
    spaces = DenseSpaces()
    product = product_of(matrices, "triton", spaces, matrices.together([torch.ones(5, device=DEVICE), *[None] * 4]))
    given = torch.randn(2, COLUMNS, device=DEVICE)
    out = product(given)
    for number, (_, values) in enumerate(made):
        exact = given @ values.t().to(DEVICE) + (number == 0)
        assert relative_error(matrices.features(number, out), exact) < DECODE
    assert spaces.on(DEVICE).memory.numel() == max(spaces._wanted.values()) > 0


def test_rows_in_another_order_and_many_tokens() -> None:
    """More than a piece that the kernels take at once."""
    matrix, values = packed_matrix(Type.Q8_0, 24, 64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    matrices = DenseMatrices([PackedWeight((matrix,), row_order=order)])
    matrices.load(DEVICE)
    given = torch.randn(1025, 64, device=DEVICE)
    out = matrices.features(0, product_of(matrices, "triton", DenseSpaces())(given))
    assert relative_error(out, given @ values[order].t().to(DEVICE)) < PREFILL


@pytest.mark.parametrize("form", ["split", "fused"])
def test_up_projections(form: str) -> None:
    heads, nope, value, rank = 3, 32, 24, 64
    if form == "fused":
        both, whole = packed_matrix(Type.Q8_0, heads * (nope + value), rank)
        keys, values = whole.view(heads, nope + value, rank).split((nope, value), dim=1)
        up = AcceleratorUpProjections.fused(both, heads, nope, value)
    else:
        k_b, transposed = packed_matrix(Type.Q8_0, rank, nope, heads=heads, seed=1)
        v_b, values = packed_matrix(Type.Q4_0, value, rank, heads=heads, seed=2)
        keys = transposed.transpose(1, 2)
        up = AcceleratorUpProjections.split(k_b, v_b)
    assert up.refusal("triton") is None
    up.load(DEVICE, torch.float32, "triton", DenseSpaces())
    for tokens, within in ((1, DECODE), (4, DECODE), (12, PREFILL)):
        query = torch.randn(1, heads, tokens, nope, device=DEVICE)
        latent = torch.randn(1, heads, tokens, rank, device=DEVICE)
        assert relative_error(up.to_latent(query), query @ keys.to(DEVICE)) < within
        assert relative_error(up.to_values(latent), latent @ values.transpose(1, 2).to(DEVICE)) < within


def test_a_layer_as_rules_place_it() -> None:
    weight, values = packed_matrix(Type.Q6_K, 40, COLUMNS)
    module = nn.Module()
    loader = PackedLoader({"m.o_proj.weight": PackedWeight((weight,))})
    stock = nn.Linear(COLUMNS, 40, bias=False)
    module.o_proj = QuantizedLinear("m.o_proj", loader, None, stock, generate_device=PLACE, gpu="triton")
    there = DenseOnAccelerators(module)
    there.load(torch.float32, progress=False)
    room = next(iter(there._spaces._made.values()))
    given = torch.randn(1, 2, COLUMNS, device=DEVICE)
    assert relative_error(module.o_proj(given)[0], given[0] @ values.t().to(DEVICE)) < DECODE
    assert there._spaces.on(DEVICE) is room, "no step allocates what kernels write between each other"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA or HIP device")
def test_a_step_can_be_captured() -> None:
    matrices, values = group(Type.Q4_K, Type.Q6_K)
    product = product_of(matrices, "triton", DenseSpaces())
    given = torch.randn(1, COLUMNS, device=DEVICE)
    product(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(given)
    given.copy_(torch.randn(1, COLUMNS, device=DEVICE))
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(out[:, : ROWS[0]], given @ values[0].t()) < DECODE


def test_matrices_are_where_kernels_can_read_them() -> None:
    matrices, _ = group(Type.Q8_0, Type.F16)
    assert all(offset % 16 == 0 for layout in matrices.layouts for offset in layout.offsets)
