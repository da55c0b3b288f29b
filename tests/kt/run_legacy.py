"""Runs inside the legacy framework's environment: builds a model with it, loads a rule file, decodes greedily.

`run_legacy.py JOB.json`: `family`, `config` (keys of the model's configuration), `gguf` (a folder), `rules`, `prompts`,
`num_tokens`, `cached`, `threads`, `capturing` (pretend to be), and `out`: an .npz of logits `[prompts, num_tokens,
vocab]`, tokens, the operators in the model, and what the run counted.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODELS = {
    "deepseek2": ("modeling_deepseek.DeepseekV2ForCausalLM", "configuration_deepseek.DeepseekV2Config"),
    "deepseek3": ("modeling_deepseek_v3.DeepseekV3ForCausalLM", "configuration_deepseek_v3.DeepseekV3Config"),
    "qwen2moe": ("modeling_qwen2_moe.Qwen2MoeForCausalLM", "transformers.Qwen2MoeConfig"),
    "mixtral": ("modeling_mixtral.MixtralForCausalLM", "transformers.MixtralConfig"),
}


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(
        importlib.import_module(module if module == "transformers" else f"ktransformers.models.{module}"), name
    )


def build(job: dict[str, Any]) -> Any:
    from ktransformers.optimize.optimize import optimize_and_load_gguf
    from ktransformers.server.config.config import Config

    Config().cpu_infer = job["threads"]
    model_class, config_class = (named(path) for path in MODELS[job["family"]])
    config = config_class(**job["config"], architectures=[model_class.__name__])
    # what local_chat gives Qwen2-MoE and Mixtral, flash attention, needs a GPU
    config._attn_implementation = "eager" if job["family"].startswith("deepseek") else "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = model_class(config)
    optimize_and_load_gguf(model, job["rules"], job["gguf"], config, default_device="cpu")
    return model.eval()


@torch.no_grad()
def decode(model: Any, prompt: list[int], num_tokens: int, cached: bool) -> tuple[list[int], list[np.ndarray]]:
    """Greedy: a prompt pass and then a token at a time, or without a cache everything anew for every token."""
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    cache = new_cache(model, len(prompt) + num_tokens)
    for _ in range(num_tokens):
        if not cached:
            cache = new_cache(model, len(prompt) + num_tokens)
        seen = len(prompt) + len(tokens) - 1 if tokens and cached else 0
        ids = torch.tensor([(prompt + tokens)[seen:]])
        at = torch.arange(seen, seen + ids.shape[1], dtype=torch.int32)
        logits = model(
            inputs_embeds=model.model.embed_tokens(ids),
            position_ids=at.unsqueeze(0).long(),
            cache_position=at,
            past_key_values=cache,
            return_dict=False,
            use_cache=True,
        )[0]
        rows.append(logits[0, -1].float().numpy())
        tokens.append(int(rows[-1].argmax()))
    return tokens, rows


def new_cache(model: Any, length: int) -> Any:
    from ktransformers.models.custom_cache import StaticCache

    return StaticCache(model.config, 1, length, device="cpu", dtype=torch.bfloat16)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    model = build(job)
    if job.get("capturing"):
        torch.cuda.is_current_stream_capturing = lambda: True
    results = [decode(model, prompt, job["num_tokens"], job["cached"]) for prompt in job["prompts"]]
    shared = getattr(model.gguf_loader, "hybrimoe_shared", None)
    counted = shared.runtime.coordinator.stats.snapshot() if shared is not None else {}
    operators = sorted({type(module).__name__ for module in model.modules()})
    np.savez(
        job["out"],
        tokens=np.array([tokens for tokens, _ in results]),
        logits=np.array([rows for _, rows in results]),
        counted=json.dumps(counted, default=str),
        operators=json.dumps(operators),
    )


if __name__ == "__main__":
    main()
