"""docs/gpu.md: what a card's run found, or, as long as there is none, that there is none and how to make one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .explain import STEPS, WHAT_TO_DO
from .plan import Plan
from .report import sections

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"

HOW = """\
```sh
make bench-gpu                                      # or python -m benchmarks.on_gpu: the card found, eight minutes
make bench-gpu ARGS=--quick                         # two minutes, one model
make bench-gpu ARGS="--minutes 30 --write-docs"     # three models without haste, and this page written from it
make bench-gpu ARGS="--accelerator emulated --quick"   # without a card: what a report looks like, times mean nothing
```

It needs a CUDA or ROCm build of PyTorch with Triton, and what the package needs anyway; it installs and downloads
nothing. Models have a released one's dimensions and random weights: files of 10 to 28 GB, written in seconds where RAM
or disk has room, deleted afterwards; with less room or time, fewer layers. The report, `report.md`, and all numbers,
`results.json`, lie in `.cache/on_gpu` and are complete at any moment; `python -m benchmarks.on_gpu --help` has the
options. With llama.cpp's `llama-bench` on PATH, or named by `--llama-bench`, it is measured on the same files.

**No time is shown of a run that was not clean.** Where an accelerator fails, the CPU answers in its place and the text
stays right; such a row has the word for it and the counts instead of times."""

NONE_YET = """\
**No such measurement exists yet: no card has run this program.** What is known without one is in
[GPU kernels](kernels.md) and [Device layer](device.md); what the CPU does is [measured](measurements.md). If you have
a card, one command measures everything that these pages only expect:"""


def page(data: dict[str, Any] | None = None) -> str:
    """The whole page. An emulated run is no measurement."""
    if data is None or Plan.from_dict(data["plan"]).is_emulated:
        return "\n\n".join(["# On a GPU", NONE_YET, HOW, *_how_to_read()]) + "\n"
    intro = "Measured with one command, on the machine below; yours will differ:"
    return "\n\n".join(["# On a GPU", intro, HOW, *sections(data)]) + "\n"


def _how_to_read() -> list[str]:
    parts = ["## How to read the report", "Its top says in short what was found. A section a step follows:"]
    for title, text in STEPS.values():
        parts += [f"### {title.format(model='A model')}", text]
    return [*parts, "## What to do if a step failed", WHAT_TO_DO]
