"""How much Python stands between a layer step and its work: counted, as time on a shared machine says little."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch

import hybrimoe_kt
from benchmarks import overhead
from hybrimoe_kt.backends.ggml import library as ggml
from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.runtime import ModelExperts, Routed, Runtime, assemble
from tests.support.expert_layers import layer, step

PACKAGE = str(Path(hybrimoe_kt.__file__).parent)
EMULATED = str(Path(PACKAGE, "device", "emulated"))


class Counted:
    """Python calls into the package during each of a runtime's steps: functions, comprehensions and lambdas alike."""

    def __init__(self, runtime: Runtime) -> None:
        self.steps: list[list[CodeType]] = []
        self._run = runtime.run

    def __call__(self, layer: int, routed: Routed) -> torch.Tensor:
        called: list[CodeType] = []

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
                called.append(frame.f_code)

        sys.setprofile(note)
        try:
            return self._run(layer, routed)
        finally:
            sys.setprofile(None)
            self.steps.append(called)


@pytest.mark.skipif(ggml.unusable() is not None, reason="ggml's library is not installed")
def test_a_step_on_the_cpu_makes_few_calls() -> None:
    """One token's, by the backend that a user gets: all that stands around one call of ggml's.

    Two of them are once a pass: the meter's, as the one layer is the first and the last.
    """
    experts = ModelExperts(ExpertOptions(accelerator="none", cpu_threads=1))
    experts.add(layer())
    runtime = assemble(experts)
    counted = Counted(runtime)
    for seed in range(3):
        counted(0, Routed(*step(1, skipped=0, seed=seed)))
    print([code.co_qualname for code in counted.steps[-1]] if sys.version_info >= (3, 11) else "")
    assert len(counted.steps[-1]) <= 38


def test_a_decode_step_makes_few_calls_in_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 experts, top-8, half of them resident, mrs, prefetch 2, gates three layers ahead, after a warm-up.

    On the immediate emulator, whose own calls stand for the driver's and are told apart. A ceiling, a little above
    what was counted: what goes beyond it has put something new between every layer and its experts.
    """
    with torch.inference_mode():
        runtime = overhead.machine(policy="mrs", prefetch_size=2)
        walk = overhead.Walk(runtime, tokens=30)
        counted = Counted(runtime)
        monkeypatch.setattr(runtime, "run", counted)
        walk.run()
    assert runtime.health().is_clean and runtime.coordinator.stats.num_prefetches > 0
    steps = counted.steps[10 * overhead.LAYERS :]
    ours = [[code for code in step if not code.co_filename.startswith(EMULATED)] for step in steps]
    calls = statistics.median(map(len, ours))
    files = statistics.median(len({code.co_filename for code in step}) for step in ours)
    quietest = min(map(len, ours))
    print(
        f"{calls:.0f} calls (quietest step {quietest}) in {files:.0f} files, and the emulator's own: "
        f"{statistics.median(map(len, steps)) - calls:.0f}"
    )
    assert calls <= 119 and quietest <= 64 and files <= 23
