"""Without torch, so that any Python may run it: ggml's products of every type that it says it computes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.quants import dequantize

from hybrimoe_kt.backends.ggml.library import F32, Context, Library, data_of, library
from hybrimoe_kt.quants import TYPES, QuantType
from tests.support.random_blocks import Type, random_blocks

ROWS = 24


def product(of: Library, ggml_type: int, raw: np.ndarray, columns: int, given: np.ndarray) -> np.ndarray:
    """`given [tokens, columns]` times the transposed matrix, on one thread of its own."""
    out = np.empty((len(given), ROWS), np.float32)
    context = Context(of, 4)
    weight, x = context.tensor(ggml_type, columns, ROWS), context.tensor(F32, columns, len(given))
    result = of.ggml_mul_mat(context.pointer, weight, x)
    data_of(weight).value, data_of(x).value, data_of(result).value = raw.ctypes.data, given.ctypes.data, out.ctypes.data
    graph = context.graph(result)
    plan = of.ggml_graph_plan(graph, 1, None)
    scratch = np.empty(plan.work_size + 64, np.uint8)
    plan.work_data = scratch.ctypes.data
    assert of.ggml_graph_compute(graph, plan) == 0
    return out


@pytest.mark.parametrize("row", library().types, ids=lambda row: row.name)
def test_products_are_those_of_the_dequantised_matrix(row: QuantType) -> None:
    of, random = library(), np.random.default_rng(row.number)
    columns = 3 * row.block_values if row.block_values > 1 else 200
    try:
        raw = random_blocks(random, Type(row.number), ROWS, columns)
        matrix = dequantize(raw, Type(row.number)).reshape(ROWS, columns)
    except (NotImplementedError, ValueError):
        pytest.skip("this version of gguf does not dequantise it")
    given = random.standard_normal((5, columns), np.float32)
    wanted = given @ matrix.T
    found = product(of, row.number, raw, columns, given)
    tolerance = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3}.get(row.name, 0.015)
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def test_activations_types_and_integers_are_no_weights() -> None:
    assert not {"I8", "I32", "Q8_1", "Q8_K", "F64"} & {row.name for row in library().types}


def test_every_type_of_published_files_is_computed() -> None:
    """What llama.cpp's own quantiser makes of Mixture-of-Experts models, by its rules and its fallbacks."""
    published = {"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0"}
    published |= {"IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"}
    assert published <= {row.name for row in library().types}
    assert len(TYPES) > len(library().types)
