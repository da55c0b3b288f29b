"""Tokens a second of vLLM on a CPU, its own experts beside ours: `python -m benchmarks.in_vllm CHECKPOINT FILE.gguf`.

Both engines stand in one process and take turns, eight requests at once each time. What counts is ours divided by
vLLM's: machines differ, and times on one do too. Run it in the environment of `make .cache/vllm` and nothing beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

ENGINE = {
    "max_model_len": 512, "max_num_seqs": 16, "seed": 0, "enable_prefix_caching": False, "kv_cache_memory_bytes": 2**28,
    "gpu_memory_utilization": 0.3,
}  # fmt: skip


def tokens_a_second(llm: Any, requests: int, tokens: int) -> float:
    """Of so many greedy answers, each to a prompt of its own length."""
    import torch
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 250, (5 + 7 * number,), generator=generator).tolist() for number in range(requests)]
    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], wanted, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - began)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="safetensors, for vLLM's own experts")
    parser.add_argument("file", type=Path, help="the same model as GGUF, or the checkpoint again, for ours")
    parser.add_argument("--dtype", default="float32", help="of the dense weights, and of vLLM's experts")
    parser.add_argument("--cpu_backend", default="auto", help="who computes our experts")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    given = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from vllm import LLM

    engine = ENGINE | {"dtype": given.dtype, "enforce_eager": given.eager}
    options = {"accelerator": "none", "cpu_backend": given.cpu_backend}
    ours = LLM(str(given.file), additional_config={"hybrimoe": options}, **engine)
    stock = LLM(str(given.checkpoint), **engine)
    ratios = []
    for number in range(given.pairs + 1):
        pair = [tokens_a_second(llm, given.requests, given.tokens) for llm in (stock, ours)]
        if number:  # the first warms up
            ratios.append(pair[1] / pair[0])
            print(f"vLLM {pair[0]:7.1f} tok/s, ours {pair[1]:7.1f} tok/s, {ratios[-1]:.2f}", flush=True)
    print(
        f"ours divided by vLLM's own, {given.requests} requests at once, median of {given.pairs} pairs: "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
