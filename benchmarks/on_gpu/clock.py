"""Step 6, if time is left: hybrid plans on three layers against the clock, all methods in turn."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from .plan import Plan
from .results import Results

__all__ = ["run"]

STEP, TABLE = "clock", "plans on the clock"
TOKENS, WARM_UP = 40, 10


def run(plan: Plan, results: Results, ends_s: float) -> None:
    """What `python -m benchmarks.hybrid` measures, on the card."""
    if plan.is_emulated:
        results.leave_out(
            STEP,
            TABLE,
            "all",
            "takes minutes without a card: python -m benchmarks.hybrid, whose GPU is emulated on the clock",
        )
        return
    import torch

    from benchmarks import hybrid
    from hybrimoe_kt.sim.generate import generate

    torch.set_num_threads(1)
    layers = [hybrid.random_layer(number) for number in range(hybrid.LAYERS)]
    trace = generate(hybrid.MODEL, prompt_tokens=0, tokens=TOKENS + WARM_UP, depth=2)
    with tempfile.TemporaryDirectory() as folder:
        base = hybrid.options_for(plan.accelerator)
        profile, layer_s = hybrid.calibrated(layers, base, Path(folder))
        results.note_step(STEP, profile=json.loads(profile.read_text(encoding="utf-8")))
        base = base.replace({"profile": str(profile)})
        for cache in ("50%", "25%", "75%"):
            if time.monotonic() > ends_s:
                results.leave_out(STEP, TABLE, cache, "out of time")
                continue
            methods = hybrid.compare(layers, trace, base, cache, layer_s, WARM_UP)
            for name, method in methods.items():
                row = hybrid.row(name, method, methods["hybrid"])
                if not methods["hybrid"].runtime.health().is_clean:
                    del row["hybrid_speedup"]  # half of it is a time of the hybrid run
                results.add(STEP, TABLE, f"{cache}, {row.pop('method')}", row, health=method.runtime.health())
