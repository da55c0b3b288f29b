"""The wait for a word as a kernel: its bounds, in the interpreter or on a GPU, and that no compiler takes it away."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hybrimoe_kt.backends.word_wait import word_wait
from hybrimoe_kt.kernels.wait_word import naive_wait_word, wait_word

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def words(*values: int) -> torch.Tensor:
    memory = torch.tensor(values, dtype=torch.int32)
    return memory if IS_INTERPRETED else memory.pin_memory()


@pytest.mark.kernels
@pytest.mark.parametrize("wait", [wait_word, naive_wait_word], ids=["kernel", "naive"])
@pytest.mark.parametrize(
    ("place", "timed_out", "polls", "wanted"),
    [(1, 0, 5, 0), (0, 0, 5, 1), (2, 0, 5, 1), (0, 1, 1 << 30, 1), (1, 1, 1 << 30, 1), (0, 0, 0, 1)],
    ids=["there", "not there", "another value", "late already", "late already but there", "no polls"],
)
def test_a_wait_ends_by_the_word_or_by_its_bound(wait: object, place: int, timed_out: int, polls: int, wanted: int):
    memory, late = words(0, 1, 2), words(timed_out)
    wait(memory, place, late, polls)  # type: ignore[operator]
    if not IS_INTERPRETED:
        torch.cuda.synchronize()
    assert (memory.tolist(), late.tolist()) == ([0, 1, 2], [wanted])


@pytest.mark.kernels
def test_a_wait_sees_what_another_thread_writes_meanwhile() -> None:
    memory, late, seen = words(0, 0, 0), words(0), []
    launch = word_wait()
    assert launch is not None

    def stream() -> None:
        launch(memory, 1, late, 1 << 30)
        if not IS_INTERPRETED:
            torch.cuda.synchronize()
        seen.append(time.perf_counter())

    thread = threading.Thread(target=stream, daemon=True)
    thread.start()
    time.sleep(0.05)
    assert not seen, "not before the word is there"
    memory[1] = 1
    thread.join(20)
    assert seen and not late.item()


LOADS = {
    "sm_90": r"ld\.volatile\.global",
    "gfx942": r"global_load_dword .*sc0 sc1",
    "gfx1100": r"global_load_b32 .*glc dlc",
}
"""What goes past all caches; on gfx942 the two bits together are the system's scope."""
COMPILE = """
import re, sys
import triton
from hybrimoe_kt.kernels.targets import TARGETS
from tools.kernel_lab.build import _gpu_target, _options, _source
from tools.kernel_lab.cases import cases_for
for name, pattern in zip(sys.argv[1::2], sys.argv[2::2]):
    [case] = [case for case in cases_for(TARGETS[name]) if case.op == "wait_word"]
    built = triton.compile(_source(case), target=_gpu_target(name), options=_options(case)).asm
    text = built["ptx"] if "ptx" in built else built["amdgcn"]
    [loop] = re.findall(r"L(?:__)?BB0_1:(.*?)L(?:__)?BB0_2:", text, re.DOTALL) or [""]
    print(name, len(re.findall(pattern, text)), len(re.findall(pattern, loop)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers run on Linux")
def test_every_look_goes_to_memory(tmp_path: Path) -> None:
    """Of three, the one in the loop among them. Triton drops `volatile` for AMD, and a compiler then drops the loop."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *(word for pair in LOADS.items() for word in pair)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.stdout.splitlines() == [f"{name} 3 1" for name in LOADS], done.stderr
