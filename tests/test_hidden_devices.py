"""An ordinary run of the tests is the same on a machine with a GPU: it does not see it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import is_for_devices

ROOT = Path(__file__).parents[1]
RUN = """
import json, os, sys
for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRITON_INTERPRET"):
    os.environ.pop(name, None)
import torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "-1"  # a machine with a GPU
import pytest
options = ["-m", sys.argv[1]] if sys.argv[1] else []
pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests/device/test_gpu.py", *options])
hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "-1" and os.environ.get("HIP_VISIBLE_DEVICES") == "-1"
print(json.dumps({"hidden": hidden, "interpreted": os.environ.get("TRITON_INTERPRET") == "1"}))
"""


@pytest.mark.parametrize(
    ("expression", "sees"),
    [("", False), ("not slow and not gpu", False), ("slow", False), ("(gpu or kernels) and not slow", True)],
)
def test_only_a_run_for_devices_sees_them(expression: str, sees: bool) -> None:
    command = [sys.executable, "-c", RUN, expression]
    shown = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert shown.stdout, shown.stderr
    assert json.loads(shown.stdout.splitlines()[-1]) == {"hidden": not sees, "interpreted": not sees}


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
