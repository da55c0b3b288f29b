"""From paths and options to an engine that answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hybrimoe_kt.device.choose import choose_accelerator
from hybrimoe_kt.errors import ConfigError, unknown_name
from hybrimoe_kt.host.hf.loading import load_model
from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.runtime import ModelExperts, Runtime, assemble
from hybrimoe_kt.weights.checkpoint import Checkpoint

from .engine import Engine
from .steps.profiler import TimeShares

__all__ = ["build_engine"]

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of the dense weights, by name; auto: float32 on a CPU, bfloat16 on a GPU."""


def build_engine(
    gguf_path: str | Path,
    *,
    model_path: str | Path | None = None,
    rules_path: str | Path | None = None,
    dtype: str = "auto",
    context_tokens: int | None = None,
    option_overrides: dict[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    kv_cache_type: str | None = None,
    progress: bool = True,
    time_shares: bool = False,
    eager: bool = False,
    parallel: int = 1,
    cache_ram: int | None = None,
    assemble: Callable[[ModelExperts], Runtime] = assemble,
) -> Engine:
    """Load model and tokenizer and share the machine's cores between torch and the experts.

    See `hybrimoe_kt.load`; `option_overrides` are `ExpertOptions` keys, `time_shares` times what a token takes, and
    `assemble` makes the runtime of the model's experts.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, DTYPES))
    _switch_cudnn_attention_off()
    overrides = option_overrides or {}
    device = _dense_device(overrides.get("accelerator", "auto"), is_planned=overrides.get("planner") == "device")
    is_cpu = device == "cpu" or device.startswith("emulated")
    chosen = DTYPES[dtype] or (torch.float32 if is_cpu else torch.bfloat16)
    loaded = load_model(
        gguf_path,
        model_path=model_path,
        rules_path=rules_path,
        dtype=chosen,
        device=device,
        option_overrides=overrides,
        metadata=metadata,
        kv_cache_type=kv_cache_type,
        context_tokens=context_tokens,
        progress=progress,
        assemble=assemble,
    )
    torch.set_num_threads(loaded.runtime.num_dense_threads)
    file = loaded.loader.file
    tokenizer = load_tokenizer(file, model_path or (file.path if isinstance(file, Checkpoint) else None))
    shares = TimeShares(loaded.model, loaded.runtime, loaded.dense_seconds) if time_shares else None
    captures = False if eager else None
    return Engine(
        loaded, tokenizer, context_tokens=context_tokens, shares=shares, captures=captures, parallel=parallel,
        cache_ram=cache_ram,
    )  # fmt: skip


def _switch_cudnn_attention_off() -> None:
    """Keep cuDNN out of scaled dot product attention, for the whole process.

    torch prefers it on Hopper, and it builds a plan for every new length of the keys, milliseconds each. Decoding
    lengthens them with every token, so that it would never use a plan twice.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _dense_device(accelerator: str, *, is_planned: bool) -> str:
    """Dense weights live where the slots do, on a real accelerator; otherwise on the CPU.

    Where tokens are to be planned on an emulated device, it has them as well: else no step of it would be captured.
    """
    chosen = choose_accelerator(accelerator)
    if chosen is None:
        return "cpu"
    return chosen.name if is_planned and chosen.device.type == "cpu" else str(chosen.device)
