"""Rules of the kernels' folder: what it may import, and that every operation has its reference beside it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrimoe_kt.quants import QuantType, kernel_types

KERNELS = Path(__file__).parents[2] / "kernels"
FILES = sorted(KERNELS.rglob("*.py"))
KNOWN = ("hybrimoe_kt.kernels", "hybrimoe_kt.quants", "hybrimoe_kt.expert_form")
OPS = sorted(file.parent for file in KERNELS.glob("*/kernel.py"))


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_kernels_know_nothing_of_the_rest() -> None:
    for file in FILES:
        for name in imported(file):
            assert name.partition(".")[0] != "hybrimoe_kt" or name.startswith(KNOWN), (
                f"{file.relative_to(KERNELS)} imports {name}"
            )


@pytest.mark.parametrize("op", OPS, ids=lambda folder: folder.name)
def test_every_kernel_has_a_reference_that_needs_no_triton(op: Path) -> None:
    assert (op / "naive.py").is_file()
    assert "triton" not in {name.partition(".")[0] for name in imported(op / "naive.py")}
    source = (op / "kernel.py").read_text(encoding="utf-8")
    assert source.count("@triton.jit") == 1, "one kernel a file"
    assert f"def {op.name}_kernel(" in source


def test_there_are_as_many_operations_as_layers_launch() -> None:
    """The rules above hold for something: seven of experts, two of linear layers, three of attention, four of rows.

    One that waits for the host, and five that plan and bring experts.
    """
    assert len(OPS) == 22


def test_no_autotuning_and_addresses_of_64_bits() -> None:
    """Autotuning decides on the host, and does not run in the interpreter."""
    for file in FILES:
        assert "autotune" not in file.read_text(encoding="utf-8"), file
    for op in ("decode_gate_up", "decode_down", "prefill_gate_up", "prefill_down"):
        source = (KERNELS / op / "kernel.py").read_text(encoding="utf-8")
        assert "slot.to(tl.int64) * slot_bytes" in source
    for op in ("decode_attention", "latent_attention"):
        assert "token.to(tl.int64)" in (KERNELS / op / "kernel.py").read_text(encoding="utf-8")
    assert "* TOKENS).to(tl.int64)" in (KERNELS / "linear_many" / "kernel.py").read_text(encoding="utf-8")


def test_choosing_and_describing_need_no_triton() -> None:
    """In a fresh interpreter without Triton, everything but operations and device functions imports."""
    names = [".".join(file.relative_to(KERNELS).with_suffix("").parts) for file in FILES]
    without = [n for n in names if "." not in n and n not in ("__init__", "layer", "linear", "attention")]
    code = "import importlib, sys\nsys.modules['triton'] = None\n"
    code += f"for name in {without}: importlib.import_module('hybrimoe_kt.kernels.' + name)\nprint('fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("row", kernel_types(), ids=lambda row: row.name)
def test_a_type_that_kernels_read_has_a_file_of_its_number(row: QuantType) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module(f"hybrimoe_kt.kernels.quants.{row.name.lower()}")
    assert module.KIND.value == row.number
    assert {"unit", "tile"} <= set(module.__all__)
    dispatch = (KERNELS / "quants" / "dispatch.py").read_text(encoding="utf-8")
    assert f"{row.name.lower()}.unit(" in dispatch and f"{row.name.lower()}.tile(" in dispatch
