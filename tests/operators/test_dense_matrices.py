"""Linear layers on an emulated accelerator: packed together by their input, rows and columns in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.gpu_dense import DenseSpaces, arithmetic_on, product_of, refusal
from hybrimoe_kt.device.dense_matrices import DenseMatrices
from hybrimoe_kt.device.packed import PackedMatrix, PackedWeight
from hybrimoe_kt.errors import CapacityError, ConfigError
from hybrimoe_kt.host.hf import dense_upload
from hybrimoe_kt.host.hf.dense_upload import DenseOnAccelerators
from hybrimoe_kt.operators.linear import QuantizedLinear
from hybrimoe_kt.quants import TYPES
from tests.support.packed import PackedLoader, odd_width, packed_matrix
from tests.support.random_blocks import KINDS, Type

from .test_linear import ROWS, weights

CPU = torch.device("cpu")


class Attention(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self, packed: Sequence[PackedWeight], *, bias: bool = False) -> None:
        super().__init__()
        loader = PackedLoader({f"attn.{name}.weight": weight for name, weight in zip(NAMES, packed, strict=True)})
        for name, weight in zip(NAMES, packed, strict=True):
            stock = nn.Linear(weight.columns, weight.features, bias=bias)
            setattr(self, name, QuantizedLinear(f"attn.{name}", loader, None, stock, generate_device="emulated:0"))


NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def loaded(packed: Sequence[PackedWeight], *, bias: bool = False) -> Attention:
    module = Attention(packed, bias=bias)
    DenseOnAccelerators(module).load(torch.float32, progress=False)
    return module


def plain(kind: Type, rows: int, *, seed: int) -> tuple[PackedWeight, torch.Tensor]:
    matrix, values = packed_matrix(
        kind, rows, 160 if TYPES[kind].block_values <= 32 else 256, seed=seed, name=str(seed)
    )
    return PackedWeight((matrix,)), values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_planes_are_the_files_bytes_again(kind: Type) -> None:
    """Of two matrices one above the other, in pieces of a few rows."""
    made = [packed_matrix(kind, rows, odd_width(kind), seed=rows) for rows in (ROWS, 5)]
    matrices = DenseMatrices([PackedWeight((matrix,)) for matrix, _ in made])
    matrices.load(CPU)
    (layout,) = matrices.layouts
    whole = torch.cat([matrix.data for matrix, _ in made])
    assert torch.equal(matrices.file_rows(layout, 0, ROWS + 5), whole)
    assert torch.equal(matrices.file_rows(layout, 3, 7), whole.view(ROWS + 5, -1)[3:10].flatten())
    assert matrices.file_bytes == whole.numel() <= matrices.num_bytes == matrices.memory.numel()


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(weights(), st.sampled_from([1, 2, 9]))
def test_rows_and_columns_may_stand_in_any_order(drawn: tuple[PackedWeight, torch.Tensor], tokens: int) -> None:
    weight, wanted = drawn
    module = nn.Module()
    loader = PackedLoader({"m.o_proj.weight": weight})
    module.o_proj = QuantizedLinear(
        "m.o_proj", loader, None, nn.Linear(64, len(wanted), bias=False), generate_device="emulated:0"
    )
    DenseOnAccelerators(module).load(torch.float32, progress=False)
    given = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(module.o_proj(given), functional.linear(given, wanted), rtol=1e-5, atol=1e-5)


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(st.data())
def test_layers_of_several_types_and_orders_together(data: st.DataObject) -> None:
    """Parts of the first layer may be of the second's types."""
    drawn = [data.draw(weights()) for _ in range(3)]
    kept = [PackedWeight(weight.parts, weight.row_order) for weight, _ in drawn]
    wholes = [torch.cat([values_of(part) for part in weight.parts]) for weight in kept]
    wanted = [whole if w.row_order is None else whole[w.row_order] for w, whole in zip(kept, wholes, strict=True)]
    matrices = DenseMatrices(kept)
    matrices.load(CPU)
    biases = [data.draw(st.sampled_from([None, torch.arange(float(len(values)))])) for values in wanted]
    product = product_of(matrices, "torch", DenseSpaces(), matrices.together(biases))
    given = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    out = product(given)
    assert out.shape == (3, sum(map(len, wanted)))
    for number, (values, bias) in enumerate(zip(wanted, biases, strict=True)):
        found = matrices.features(number, out)
        torch.testing.assert_close(found, functional.linear(given, values, bias), rtol=1e-5, atol=1e-5)


def values_of(part: PackedMatrix) -> torch.Tensor:
    from hybrimoe_kt.backends.dequantize import dequantize

    return dequantize(part.data, part.ggml_type, (part.rows, part.columns))


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_layers_answer_whoever_asks_first_and_however_often(bias: bool) -> None:
    made = [
        plain(kind, rows, seed=rows)
        for kind, rows in zip((Type.Q8_0, Type.Q4_0, Type.Q8_0, Type.F16), (5, 6, 7, 8), strict=True)
    ]
    module = loaded([weight for weight, _ in made], bias=bias)
    layers = {name: getattr(module, name) for name in NAMES}
    wanted = {
        name: lambda given, values=values, name=name: functional.linear(given, values, layers[name].bias)
        for name, (_, values) in zip(NAMES, made, strict=True)
    }
    assert layers["q_proj"]._by_accelerator.func.__self__ is layers["v_proj"]._by_accelerator.func.__self__
    assert layers["q_proj"]._by_accelerator.func.__self__ is not layers["o_proj"]._by_accelerator.func.__self__
    first, second = torch.randn(2, 3, 160), torch.randn(160)
    for name, given in [
        ("k_proj", first), ("q_proj", first), ("v_proj", first), ("q_proj", first), ("q_proj", first),
        ("k_proj", second), ("v_proj", first), ("o_proj", first), ("v_proj", first), ("k_proj", first),
    ]:  # fmt: skip
        torch.testing.assert_close(layers[name](given), wanted[name](given), rtol=1e-5, atol=1e-5)
    changed = first.clone()
    torch.testing.assert_close(layers["q_proj"](changed), wanted["q_proj"](changed), rtol=1e-5, atol=1e-5)
    changed += 1  # between two rounds: the first to ask is computed anew
    torch.testing.assert_close(layers["q_proj"](changed), wanted["q_proj"](changed), rtol=1e-5, atol=1e-5)
    assert layers["q_proj"](torch.empty(2, 0, 160)).shape == (2, 0, 5)


def test_nothing_is_kept_of_an_input_once_all_have_asked() -> None:
    module = loaded([plain(Type.Q8_0, rows, seed=rows)[0] for rows in (5, 6, 7, 8)])
    shared, given = module.q_proj._by_accelerator.func.__self__, torch.randn(160)
    for name in NAMES[:3]:
        getattr(module, name)(given)
    assert shared._given is None and shared._out is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_answer_has_the_inputs_dtype(dtype: torch.dtype) -> None:
    weight, values = plain(Type.Q6_K, ROWS, seed=1)
    module = loaded([weight, *(plain(Type.Q8_0, 3, seed=seed)[0] for seed in range(2, 5))])
    given = torch.randn(4, 256).to(dtype)
    found = module.q_proj(given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), given.float() @ values.t(), rtol=2e-2, atol=2e-2)


def test_what_no_kernel_reads_is_told() -> None:
    tq2, wide = packed_matrix(Type.TQ2_0, 4, 256)[0], packed_matrix(Type.F16, 4, 50, name="odd")[0]
    assert refusal(PackedWeight((tq2,)), "triton") == "matrix is TQ2_0, which no GPU kernel reads"
    assert (
        refusal(PackedWeight((wide,)), "triton") == "odd has 50 columns of F16; GPU kernels want multiples of 8 columns"
    )
    assert refusal(PackedWeight((tq2, wide)), "torch") is None
    assert refusal(PackedWeight((packed_matrix(Type.Q8_0, 3, 64)[0],)), "triton") is None
    assert refusal(PackedWeight((tq2,)), "float")


def test_who_multiplies_where(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arithmetic_on(CPU, "auto") == "torch"
    assert arithmetic_on(torch.device("xpu"), "auto") == "float"
    assert arithmetic_on(torch.device("xpu"), "torch") == "torch"
    with pytest.raises(ConfigError, match="gpu is 'triton', but no kernel was built for xpu devices; or give auto"):
        arithmetic_on(torch.device("xpu"), "triton")
    with pytest.raises(ConfigError, match="unknown gpu 'trition', did you mean 'triton'"):
        QuantizedLinear.check_kwargs({"gpu": "trition"})


def test_no_room_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DenseMatrices, device: torch.device, told: Callable[[int], object]) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dense_upload.DenseMatrices, "load", full)
    with pytest.raises(CapacityError, match=r"the dense weights take 0\.00 GB, which the accelerator has not free"):
        loaded([plain(Type.Q8_0, rows, seed=rows)[0] for rows in (5, 6, 7, 8)])
