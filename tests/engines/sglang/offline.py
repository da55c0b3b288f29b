"""Greedy tokens of eight concurrent prompts from SGLang, in a process of its own.

`python -m tests.engines.sglang.offline MODEL ANSWER.json '{"tp_size": 2, ...}'`: the last are arguments of `Engine`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.engines.vllm.offline import prompts

ROOT = Path(__file__).parents[3]
STAND_INS = Path(__file__).parent / "stand_ins"
ENGINE = {
    "device": "cpu", "dtype": "float32", "attention_backend": "torch_native", "context_length": 256,
    "max_running_requests": 8, "max_total_tokens": 4096, "mem_fraction_static": 0.2, "random_seed": 0,
    "disable_radix_cache": True, "log_level": "warning",
}  # fmt: skip
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}{os.pathsep}{STAND_INS}"}
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def hybrimoe(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make experts ours."""
    return {"quantization": "hybrimoe", "model_loader_extra_config": json.dumps({"hybrimoe": options})}


def elsewhere(model: str | Path, folder: Path, *, env: dict[str, str] | None = None, **engine: Any) -> list[list[int]]:
    """Answers of 12, 13, ... tokens, all asked for at once; fails with what the process said last."""
    file = folder / f"answer-{time.monotonic_ns()}.json"
    command = [sys.executable, "-m", "tests.engines.sglang.offline", str(model), str(file), json.dumps(ENGINE | engine)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT | (env or {}), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: list[list[int]] = json.loads(file.read_text())
    return found


def main(model: str, file: str, engine: str) -> None:
    """See the top of this file."""
    from sglang import Engine

    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"] if Path(model).is_dir() else 256
    with Engine(model_path=model, skip_tokenizer_init=True, **json.loads(engine)) as running:
        wanted = [{"temperature": 0, "max_new_tokens": 12 + place, "ignore_eos": True} for place in range(8)]
        answers = running.generate(input_ids=prompts(vocabulary), sampling_params=wanted)
    Path(file).write_text(json.dumps([each["output_ids"] for each in answers]))


if __name__ == "__main__":
    main(*sys.argv[1:])
