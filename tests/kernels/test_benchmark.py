"""The kernels' benchmark without a GPU: its arithmetic, the tables made of it, and that it runs at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_roofline import expert_bytes, experts_used, mean_roofline, mixes_of, roofline, table
from benchmarks.on_gpu import kernels, linears
from benchmarks.on_gpu.plan import Plan
from benchmarks.on_gpu.results import Results
from hybrimoe_kt.kernels.targets import TARGETS
from hybrimoe_kt.quants import kernel_types
from hybrimoe_kt.sim.models import MODELS
from tests.support.random_blocks import Type

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_roofline_by_hand() -> None:
    """Mixtral, 2 of 8 experts of 4096 x 14336, 3 matrices of 4.5 bits: 198 MB, 258 us at 768 GB/s."""
    spec = MODELS["mixtral-8x7b"]
    bound = roofline(spec, mixes_of(spec.name)[0], TARGETS["sm_86"], 1)
    assert bound.memory_s == pytest.approx(2 * 3 * 4096 * 14336 * 4.5 / 8 / 768e9)
    # 512 tokens x 2 experts x 3 matrices, 512 multiply-adds a clock on each of 84 cores at 1.8 GHz
    bound = roofline(spec, mixes_of(spec.name)[0], TARGETS["sm_86"], 512)
    assert bound.tensor_s == pytest.approx(512 * 2 * 3 * 4096 * 14336 / (512 * 84 * 1.8e9))
    assert bound.seconds == bound.tensor_s > bound.memory_s


def test_mixes_are_averaged() -> None:
    spec = MODELS["deepseek-v2-lite"]
    light, heavy = (expert_bytes(spec, kinds) for kinds in mixes_of(spec.name))
    assert (light + heavy) / 2 == pytest.approx(5.77e6, rel=1e-3)
    mean = mean_roofline(spec, TARGETS["sm_90"], 1).memory_s
    assert mean == pytest.approx(spec.top_k * (light + heavy) / 2 / 3350e9)


def test_experts_used() -> None:
    spec = MODELS["qwen3-30b-a3b"]
    assert experts_used(spec, 1) == pytest.approx(8)
    assert experts_used(spec, 2) == pytest.approx(8 + 8 * (1 - 8 / 128))
    assert experts_used(spec, 10_000) == pytest.approx(128)


@pytest.mark.parametrize("num_tokens", [1, 8, 512])
def test_the_document_shows_these_tables(num_tokens: int) -> None:
    assert table(num_tokens) in DOCUMENT.read_text(encoding="utf-8")


def test_it_measures_something_even_in_the_interpreter() -> None:
    """Figures mean nothing here; that every part of the benchmark runs does."""
    layer = kernels.make_layer(kernels.TINY, (12, 12, 14), torch.device("cpu"))
    found = kernels.measure(layer, kernels.TINY, (12, 12, 14), 1, bandwidth=1e9, launches=2)
    assert found["experts"] == kernels.TINY.top_k
    read = found["experts"] * expert_bytes(kernels.TINY, (12, 12, 14))
    assert found["gb_per_s"] == pytest.approx(read / found["us"] / 1e3)
    assert found["of_copy"] == pytest.approx(found["gb_per_s"] / 1.0)
    assert found["of_roofline"] > 0 < found["over_torch"]


def test_linear_layers_are_measured_in_the_interpreter_too(tmp_path: Path) -> None:
    results = Results.begin(Plan("emulated", out=str(tmp_path)))
    linears.run(results.plan, results, torch.device("cpu"), bandwidth=1e9, ends_s=float("inf"))
    rows = results.rows("kernels", "linears")
    assert [row["name"] for row in rows] == ["tiny, Q4_K, 1 token", "tiny, Q4_K, 2 tokens"]
    for row in rows:
        found = row["values"]
        assert found["gb_per_s"] == pytest.approx(72 * 144 / found["us"] / 1e3)
        assert found["of_copy"] == pytest.approx(found["gb_per_s"])
    assert "| tiny, Q4_K, 1 token |" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("bytes_wanted", "num_layers"), [(0, 2), (3 * 15_232 - 1, 2), (3 * 15_232, 3)])
def test_linear_layers_fill_more_than_a_cache(bytes_wanted: int, num_layers: int) -> None:
    """72 x 256 values of Q6_K are planes of 9216, 4608, 1152 and 144 bytes, the last of which is rounded up to 256."""
    work = linears.Work(Type.Q6_K, *linears.TINY["tiny"], 1, torch.device("cpu"), bytes_wanted)
    assert len(work.layers) == num_layers


def test_linear_layers_have_shapes_that_every_type_can_have() -> None:
    assert all(columns % row.column_step == 0 for _, columns in linears.SHAPES.values() for row in kernel_types())
