"""Linear layers and embeddings on packed weights: every type, odd shapes, both methods, rows in any order."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.dequantize import dequantize
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.backends.ggml import linear
from hybrimoe_kt.backends.ggml.linear import PackedProduct
from hybrimoe_kt.backends.ggml.pool import pool
from hybrimoe_kt.backends.ggml.products import dequantize_into
from hybrimoe_kt.device.packed import PackedWeight
from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.operators.embedding import QuantizedEmbedding
from hybrimoe_kt.operators.linear import QuantizedLinear
from tests.support.packed import PackedLoader, odd_width, packed_matrix
from tests.support.random_blocks import KINDS, Type

needs_ggml = pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
ROWS = 37
TOKENS = (1, 2, 3, 5, 16, 63, 64, 65, 200)
METHODS = {"ggml": False, "bfloat16": True}
TOLERANCE = {Type.F32: 1e-6, Type.F16: 5e-4, Type.BF16: 4e-3}
"""|difference| / |product|; of blocks 0.02, and by bfloat16 0.005, whatever the type.

Measured at most 2e-7, 0.0003, 0.0019, 0.0106 (Q5_K) and 0.0030 with ggml 0.20.2 on AVX2.
"""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the processor multiplies bfloat16, which decides from 64 tokens on; with pieces of a few rows each."""
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda: METHODS[request.param])
    monkeypatch.setattr(linear, "_PIECE_VALUES", 1500)
    return str(request.param)


def tolerance(kind: Type, tokens: int, method: str) -> float:
    rounds = method == "bfloat16" and tokens >= 64 and kind not in (Type.F32, Type.F16)
    return 5e-3 if rounds else TOLERANCE.get(kind, 0.02)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, within: float) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= within * wanted.norm()


def of(weight: PackedWeight, bias: torch.Tensor | None = None) -> QuantizedLinear:
    """The operator in place of a layer of zeros."""
    stock = nn.Linear(weight.columns, weight.rows, bias=bias is not None, dtype=None if bias is None else bias.dtype)
    nn.init.zeros_(stock.weight)
    if bias is not None:
        stock.bias = nn.Parameter(bias)
    return QuantizedLinear("model.q_proj", PackedLoader({"model.q_proj.weight": weight}), None, stock)


@needs_ggml
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_equals_the_product(kind: Type, method: str) -> None:
    matrix, values = packed_matrix(kind, ROWS, odd_width(kind))
    product = PackedProduct(PackedWeight((matrix,)))
    for tokens in TOKENS:
        given = torch.randn(tokens, matrix.columns)
        assert_close(product(given), (given.double() @ values.double().t()).float(), tolerance(kind, tokens, method))


@needs_ggml
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_values_are_those_of_gguf(kind: Type) -> None:
    """ggml's dequantisation, which products with many tokens begin with."""
    matrix, values = packed_matrix(kind, ROWS, odd_width(kind))
    found = torch.empty_like(values)
    dequantize_into(matrix.data.data_ptr(), int(kind), ROWS, matrix.columns, found)
    torch.testing.assert_close(found, values, rtol=2e-7, atol=0)


@needs_ggml
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_layer_adds_its_bias_in_any_number_of_dimensions(tokens: int, method: str) -> None:
    matrix, values = packed_matrix(Type.Q8_0, ROWS, 96)
    bias = torch.randn(ROWS)
    ours, given = of(PackedWeight((matrix,)), bias), torch.randn(2, tokens, 3, 96)
    wanted = functional.linear(given, values, bias)
    assert_close(ours(given), wanted, 0.02)
    assert_close(ours(given[0, :, 0]), wanted[0, :, 0], 0.02)
    assert_close(ours(given[0, 0, 0]), wanted[0, 0, 0], 0.02)
    assert torch.equal(ours.bias, bias) and "weight" not in dict(ours.named_parameters())
    assert (ours(torch.zeros(96)) - bias).abs().max() == 0


@needs_ggml
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 70])
def test_a_model_of_another_type_gets_its_own_back(tokens: int, dtype: torch.dtype, method: str) -> None:
    matrix, values = packed_matrix(Type.Q6_K, ROWS, 256)
    bias = torch.randn(ROWS).to(dtype)
    given = torch.randn(tokens, 256).to(dtype)
    found = of(PackedWeight((matrix,)), bias)(given)
    assert found.dtype == dtype
    assert_close(found.float(), functional.linear(given.float(), values, bias.float()), 0.02)


@needs_ggml
def test_no_tokens_give_none(method: str) -> None:
    matrix, _ = packed_matrix(Type.Q8_0, ROWS, 96)
    assert of(PackedWeight((matrix,)))(torch.randn(2, 0, 96)).shape == (2, 0, ROWS)


@needs_ggml
def test_strided_input_is_read_as_it_looks(method: str) -> None:
    matrix, _ = packed_matrix(Type.Q8_0, ROWS, 96)
    ours, given = of(PackedWeight((matrix,))), torch.randn(70, 96)
    assert torch.equal(ours(torch.empty(96, 70).copy_(given.t()).t()), ours(given))
    assert torch.equal(ours(given[::2]), ours(given[::2].contiguous()))
    assert torch.equal(ours(given[:1].expand(66, -1)), ours(given[:1].repeat(66, 1)))


@needs_ggml
def test_weights_are_read_in_place(method: str) -> None:
    matrix, _ = packed_matrix(Type.Q8_0, ROWS, 96)
    product = PackedProduct(PackedWeight((matrix,)))
    for tokens in (1, 70):
        given, kept = torch.randn(tokens, 96), matrix.data.clone()
        assert product(given).norm() > 0
        matrix.data.zero_()
        assert product(given).norm() == 0
        matrix.data.copy_(kept)


@needs_ggml
def test_inputs_are_left_as_they_are(method: str) -> None:
    matrix, _ = packed_matrix(Type.Q4_0, ROWS, 96)
    ours, given = of(PackedWeight((matrix,)), torch.ones(ROWS)), torch.randn(70, 96)
    kept = given.clone()
    first = ours(given)
    again = first.clone()
    ours(given * 2)
    assert torch.equal(given, kept) and torch.equal(first, again)


@st.composite
def weights(draw: st.DrawFn) -> tuple[PackedWeight, torch.Tensor]:
    """Parts of several types one above the other, maybe in another order; and the whole matrix in that order."""
    kinds: Sequence[Type] = draw(
        st.lists(st.sampled_from([Type.Q8_0, Type.Q4_0, Type.F16, Type.MXFP4]), min_size=1, max_size=3)
    )
    made = [packed_matrix(kind, draw(st.integers(1, 9)), 64, seed=seed) for seed, kind in enumerate(kinds)]
    whole = torch.cat([values for _, values in made])
    rows = draw(st.none() | st.permutations(range(len(whole))))
    columns = draw(st.none() | st.permutations(range(64)))
    orders = [None if order is None else torch.tensor(order) for order in (rows, columns)]
    # Feature i of the input meets column i of the model's matrix, so column_order is where each column went.
    wanted = whole if orders[0] is None else whole[orders[0]]
    if orders[1] is not None:
        wanted = torch.empty_like(wanted).index_copy_(1, orders[1], wanted)
    return PackedWeight(tuple(matrix for matrix, _ in made), *orders), wanted


@needs_ggml
@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(weights(), st.sampled_from([1, 2, 3, 65]), st.booleans())
def test_rows_and_columns_may_stand_in_any_order(
    drawn: tuple[PackedWeight, torch.Tensor], tokens: int, by_bfloat16: bool
) -> None:
    weight, wanted = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "multiplies_bfloat16", lambda: by_bfloat16)
        given = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
        found = of(weight)(given)
    exact = functional.linear(given, wanted)
    assert found.shape == exact.shape
    bound = given.norm(dim=1, keepdim=True) * wanted.norm(dim=1)
    assert ((found - exact).abs() <= 0.02 * bound).all(), "each value, so that no two rows are confused"


@needs_ggml
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int, method: str) -> None:
    matrix, _ = packed_matrix(Type.Q5_K, 301, 256)
    product, given = PackedProduct(PackedWeight((matrix,))), torch.randn(70, 256)
    try:
        pool(2)
        wanted = [product(given[:tokens]) for tokens in (1, 9, 70)]
        pool(threads)
        assert all(torch.equal(product(given[: len(one)]), one) for one in wanted)
    finally:
        pool(2)


def test_a_layer_of_another_kind_is_refused() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(ConfigError, match=r"replaces torch\.nn\.Linear, found Own"):
        QuantizedLinear("model.q_proj", PackedLoader(), None, Own(2, 2))
    with pytest.raises(ConfigError, match=r"replaces torch\.nn\.Embedding, found Linear"):
        QuantizedEmbedding("model.embed_tokens", PackedLoader(), None, nn.Linear(2, 2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_embedded_rows_are_the_dequantised_ones_bit_for_bit(kind: Type) -> None:
    matrix, values = packed_matrix(kind, ROWS, odd_width(kind))
    whole = dequantize(matrix.data, int(kind), (ROWS, matrix.columns))
    torch.testing.assert_close(whole, values, rtol=2e-7, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        stock = nn.Embedding(ROWS, matrix.columns, dtype=dtype)
        loader = PackedLoader({"model.embed_tokens.weight": PackedWeight((matrix,))})
        ours = QuantizedEmbedding("model.embed_tokens", loader, None, stock)
        assert not list(ours.parameters())
        for ids in (torch.tensor([[0]]), torch.tensor([[3, 36, 3], [0, 1, 2]]), torch.arange(ROWS), torch.tensor(5)):
            found = ours(ids)
            assert found.dtype == dtype and torch.equal(found, whole[ids].to(dtype))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_an_embedding_that_is_not_packed_is_what_it_was(place: str) -> None:
    matrix, _ = packed_matrix(Type.Q8_0, ROWS, 96)
    packed = {"model.embed_tokens.weight": PackedWeight((matrix,))} if place != "cpu" else {}
    stock = nn.Embedding(ROWS, 96)
    ours = QuantizedEmbedding("model.embed_tokens", PackedLoader(packed), None, stock, generate_device=place)
    assert ours.weight is stock.weight
    ids = torch.tensor([[1, 36]])
    assert torch.equal(ours(ids), stock(ids))


def test_an_id_out_of_range_is_an_error() -> None:
    """As of the embedding that it replaces, which reads nothing behind its end."""
    matrix, _ = packed_matrix(Type.Q8_0, ROWS, 96)
    loader = PackedLoader({"model.embed_tokens.weight": PackedWeight((matrix,))})
    ours = QuantizedEmbedding("model.embed_tokens", loader, None, nn.Embedding(ROWS, 96))
    with pytest.raises(IndexError):
        ours(torch.tensor([ROWS]))
