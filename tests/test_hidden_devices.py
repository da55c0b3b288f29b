"""An ordinary run of the tests is the same on a machine with a GPU: it does not see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import is_for_devices

ROOT = Path(__file__).parents[1]
RUN = """
import functools, os, sys
for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRITON_INTERPRET"):
    os.environ.pop(name, None)
import torch
sees = lambda: {os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")} != {"-1"}
torch.cuda.is_available = functools.cache(sees)  # a machine with a GPU; as in torch, the first answer stays
import pytest
options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "tests.conftest", "-c", sys.argv[1], sys.argv[2]]
sys.exit(pytest.main(options + (["-m", sys.argv[3]] if sys.argv[3] else [])))
"""
PROBE = """
import subprocess, sys
import pytest
from tests.kernels.layers import DEVICE

CHILD = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('TRITON_INTERPRET'))"

{marks}
def test_probe():
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    print("found:", DEVICE, child)
"""


@pytest.mark.parametrize(
    ("marks", "expression", "found"),
    [
        ("", "", "cpu -1 1"),
        ("", "not slow and not gpu", "cpu -1 1"),
        ("@pytest.mark.slow", "slow", "cpu -1 1"),
        ("@pytest.mark.kernels", "(gpu or kernels) and not slow", "cuda None None"),
    ],
    ids=["all", "ordinary", "slow", "devices"],
)
def test_only_a_run_for_devices_sees_them(tmp_path: Path, marks: str, expression: str, found: str) -> None:
    """Nor do processes that tests start see more, and nobody asks before it is decided."""
    probe = tmp_path / "test_probe.py"
    probe.write_text(PROBE.format(marks=marks), encoding="utf-8")
    command = [sys.executable, "-c", RUN, str(ROOT / "pyproject.toml"), str(probe), expression]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert f"found: {found}" in shown.stdout, shown.stdout + shown.stderr
    assert shown.returncode == 0


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("", False),
        ("not slow", False),
        ("gpu", True),
        ("not gpu", False),
        ("gpu and slow", False),
        ("slow or gpu", True),
        ("gpu and (", False),
    ],
)
def test_the_expression_is_read_as_pytest_reads_it(expression: str, wanted: bool) -> None:
    assert is_for_devices(expression) == wanted
