"""llama.cpp (the prebuilt xllamacpp) as an oracle: greedy tokens and the margin each was chosen by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

__all__ = ["LlamaCpp"]


class LlamaCpp:
    """One model, one thread, F32 KV cache, no flash attention: as close to plain arithmetic as it gets."""

    def __init__(self, path: Path, context: int = 512) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp (test extra) is not installed")
        parameters = xllamacpp.CommonParams()
        parameters.model.path, parameters.verbosity = str(path), -1
        parameters.n_ctx, parameters.n_parallel, parameters.warmup = context, 1, False
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Tokens, and per token the log-probability by which it beat the second choice."""
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "n_probs": 2, "cache_prompt": False}
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        margins = [step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"] for step in steps]
        return [step["id"] for step in steps], margins

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens; empty where the likeliest is no whole UTF-8 character."""
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 4, "cache_prompt": False}
        )
        steps = (answer["choices"][0]["logprobs"] or {}).get("content")
        return {choice["id"]: choice["logprob"] for choice in steps[0]["top_logprobs"]} if steps else {}
