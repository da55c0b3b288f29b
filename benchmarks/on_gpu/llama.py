"""Step 5: llama.cpp's own benchmark on the same file, where a build with GPU support is at hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

from .plan import Plan
from .results import Results

__all__ = ["run"]

TABLE = "llama.cpp"


def run(plan: Plan, results: Results, ends_s: float, model: str) -> None:
    """Decode and prompt, everything on the card and the experts of some layers on the CPU; one line otherwise."""
    step, made = f"llama:{model}", results.data["steps"].get(f"model:{model}", {})
    program = plan.llama_bench or shutil.which("llama-bench")
    file = Path(made.get("file", ""))
    if plan.is_emulated:
        results.leave_out(step, TABLE, "all", "needs a card: nothing to compare with here")
    elif not program:
        results.leave_out(
            step, TABLE, "all", "no llama-bench on PATH; give one with --llama-bench PATH (a CUDA or HIP build)"
        )
    elif not file.is_file():
        results.leave_out(step, TABLE, "all", "the model's file was not made, see above")
    else:
        _bench(results, ends_s, step, program, file)


def _bench(results: Results, ends_s: float, step: str, program: str, file: Path) -> None:
    from hybrimoe_kt.weights.gguf_file import GgufFile

    opened = GgufFile(file)
    layers = int(opened.metadata[f"{opened.architecture}.block_count"])
    for share in (0.0, 0.5, 0.25, 0.75):
        on_cpu = round(share * layers)
        name = "all on the card" if not on_cpu else f"experts of {on_cpu} of {layers} layers on the CPU"
        command = [program, "-m", str(file), "-ngl", "99", "-p", "512", "-n", "64", "-r", "2", "-o", "json"]
        left_s = ends_s - time.monotonic()
        if left_s < 5:
            results.leave_out(step, TABLE, name, "out of time")
            continue
        try:
            done = subprocess.run(
                [*command, "-ncmoe", str(on_cpu)], capture_output=True, text=True, timeout=left_s, check=False
            )
            rows = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            results.fail(step, TABLE, name, f"{type(error).__name__}: {_last(error)}")
            continue
        rates = {"decode" if row["n_gen"] else "prefill_512": float(row["avg_ts"]) for row in rows}
        backends = {str(row.get("backends", "")) for row in rows}
        if not any(kind in said.upper() for said in backends for kind in ("CUDA", "ROCM", "HIP")):
            results.leave_out(step, TABLE, name, f"this llama-bench has no CUDA or HIP ({', '.join(backends)})")
            return
        if rates.get("decode"):
            rates["ms"] = 1e3 / rates["decode"]
        results.add(step, TABLE, name, rates, note=f"{rows[0].get('n_threads', '?')} threads" if rows else "")


def _last(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["it said nothing"])[-1][:200]
