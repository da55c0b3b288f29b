"""Greedy tokens of eight concurrent prompts from vLLM, in this process or one of its own.

`python -m tests.engines.vllm.offline MODEL ANSWER.json '{"tensor_parallel_size": 2, ...}'`: engine arguments last.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
ENGINE = {
    "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "seed": 0,
    "enable_prefix_caching": False, "kv_cache_memory_bytes": 2**26, "gpu_memory_utilization": 0.2,
}  # fmt: skip
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
"""Nothing is reported to anybody."""
_IN_PROCESS = {"VLLM_CPU_CI_ENV": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_AOT_COMPILE": "0"}
"""Nothing is warmed up, or compiled for later. Ranks of a pipeline have to be: vLLM's own fail at once else."""


def prompts(vocabulary: int, count: int = 8) -> list[list[int]]:
    """Token ids of prompts of 5, 12, 19, ... tokens."""
    import torch

    generator = torch.Generator().manual_seed(3)
    top = min(vocabulary, 256)
    return [torch.randint(4, top, (5 + 7 * number,), generator=generator).tolist() for number in range(count)]


def answers(llm: Any, tokens: int, count: int = 8) -> list[list[int]]:
    """Greedy answers of `tokens`, one more, ... tokens, all asked for at once."""
    from vllm import SamplingParams

    given = prompts(llm.llm_engine.vllm_config.model_config.get_vocab_size(), count)
    wanted = [SamplingParams(temperature=0, max_tokens=tokens + place, ignore_eos=True) for place in range(count)]
    outputs = llm.generate([{"prompt_token_ids": each} for each in given], wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def here(model: str | Path, *, tokens: int = 12, count: int = 8, **engine: Any) -> list[list[int]]:
    """The same of a model loaded in this process, and let go again."""
    os.environ |= ENVIRONMENT | _IN_PROCESS
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(model), **(ENGINE | engine))
    try:
        return answers(llm, tokens, count)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def elsewhere(model: str | Path, folder: Path, *, env: dict[str, str] | None = None, **engine: Any) -> list[list[int]]:
    """The same from a process of its own, which may start others; fails with what it said last."""
    file = folder / f"answer-{time.monotonic_ns()}.json"
    command = [sys.executable, "-m", "tests.engines.vllm.offline", str(model), str(file), json.dumps(ENGINE | engine)]
    given = {name: value for name, value in os.environ.items() if name not in _IN_PROCESS}
    done = subprocess.run(
        command, cwd=ROOT, env=given | ENVIRONMENT | (env or {}), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: list[list[int]] = json.loads(file.read_text())
    return found


def main(model: str, file: str, engine: str) -> None:
    """See the top of this file."""
    from vllm import LLM

    Path(file).write_text(json.dumps(answers(LLM(model, **json.loads(engine)), 12)))


if __name__ == "__main__":
    main(*sys.argv[1:])
