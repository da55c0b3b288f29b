"""What of vLLM's configuration follows from ours: which loader, which scheduler, which graphs."""

from __future__ import annotations

import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError, HybriMoEError, ModelError
from hybrimoe_kt.host.engines.model_folder import has_tokenizer, model_folder

from .names import FILE_KEY, METHOD, OPTIONS_KEY, SPLITTING_OP, TOKENIZER_MODE

__all__ = ["extend_arguments"]

logger = init_logger("vllm.hybrimoe")

_SCHEDULERS = "hybrimoe_kt.host.vllm.scheduler"
_REFUSED = {
    "enable_dbo": "has two halves of a batch under way, where one step of experts is",
    "enable_eplb": "moves experts between ranks, which are read in place here",
    "enable_lora": "changes experts by what it adds to their matrices, which are packed here",
    "enable_sleep_mode": "takes memory away that experts stand in",
    "prefill_context_parallel_size": "gathers other ranks' tokens in a way that is not known here",
    "kv_transfer_config": "would hand on keys and values of steps that failed",
}
"""Argument -> what it does."""
_COUNT_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"


def extend_arguments() -> None:
    """Look at arguments before and at what is made of them after vLLM does, once a process."""
    if hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        return
    original = EngineArgs.create_engine_config

    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, *args, **kwargs)
        try:
            _prepare(self)
            config = original(self, *args, **kwargs)
            _complete(config)
        except HybriMoEError as error:
            if not _is_command():
                raise
            sys.exit(f"vllm: error: {error}")
        return config

    EngineArgs.create_engine_config = create_engine_config


def _is_command() -> bool:
    """Whether `vllm` was typed: a sentence then says more than a traceback."""
    return Path(sys.argv[0]).name == "vllm" or sys.argv[0].endswith("vllm/entrypoints/cli/main.py")


def _is_ours(args: Any) -> bool:
    is_named = args.quantization == METHOD or OPTIONS_KEY in (args.additional_config or {})
    return is_named or (str(args.model).endswith(".gguf") and args.quantization is None and args.load_format == "auto")


def _prepare(args: Any) -> None:
    """Name our method and loader, and the folder that describes the model; ConfigError or ModelError."""
    given = dict(args.additional_config or {})
    options = given.setdefault(OPTIONS_KEY, {})
    if not isinstance(options, dict):
        raise ConfigError(f'--additional-config: "{OPTIONS_KEY}" is {options!r}, valid: {{"cache_size": "12GiB", ...}}')
    ExpertOptions.from_kwargs(options)
    for flag, why in _REFUSED.items():
        value = getattr(args, flag)
        if value is True or (value and value != 1):  # of ranks, one is none
            raise ConfigError(f"--{flag.replace('_', '-')} {why}; leave it out")
    if FILE_KEY not in given:
        if not Path(args.model).exists():
            raise ModelError(f"{args.model}: no such file or directory; download the model first, and give its folder")
        given[FILE_KEY] = str(Path(args.model).resolve())
    file = given[FILE_KEY]
    args.served_model_name = args.served_model_name or [args.model]  # not the folder, but what the user called it
    args.additional_config = given
    args.quantization, args.load_format = METHOD, METHOD
    is_own_tokenizer = args.tokenizer in (None, args.model)
    args.model = str(model_folder(file, _architecture))
    args.tokenizer = args.model if is_own_tokenizer else args.tokenizer
    if is_own_tokenizer and not has_tokenizer(args.model):
        args.tokenizer_mode = TOKENIZER_MODE
    if args.enforce_eager or not current_platform.is_cuda_alike():
        return
    mode = args.compilation_config.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs() and mode != CUDAGraphMode.FULL_AND_PIECEWISE:
        raise ConfigError(
            f"cudagraph_mode {mode.name} would capture decisions that the host makes anew in every step; give "
            """--compilation-config '{"cudagraph_mode": "PIECEWISE"}', or --enforce-eager"""
        )
    if mode is None or mode.has_full_cudagraphs():
        args.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE


def _architecture(name: str) -> str:
    """vLLM's model for Transformers' class of this name; ModelError where it has none."""
    known = ModelRegistry.get_supported_archs()
    if name not in known:
        raise ModelError(f"vLLM has no {name}, so this model runs in `ktransformers` only")
    return name


def _complete(config: Any) -> None:
    """Let failed steps end, and keep our layers out of captured graphs."""
    os.environ[_COUNT_NANS] = "1"
    if config.model_config.runner_type != "generate":
        raise ConfigError(
            f"--runner {config.model_config.runner_type} answers no tokens; use vLLM's own experts for it"
        )
    guessing = config.speculative_config
    draft = guessing.draft_model_config if guessing is not None else None
    if draft is not None and draft.quantization == METHOD:
        raise ConfigError(
            f"--speculative-config: {guessing.method} reads its draft from this model's own file, whose last layers "
            f"are left out here; name a draft model"
        )
    scheduler = config.scheduler_config
    if scheduler.scheduler_cls is None:
        name = "AsyncHybridScheduler" if scheduler.async_scheduling else "HybridScheduler"
        scheduler.scheduler_cls = f"{_SCHEDULERS}.{name}"
    _complete_graphs(config.compilation_config)
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1 and current_platform.is_cpu() and parallel.enable_expert_parallel:
        raise ConfigError("vLLM's CPU build has no data parallel with expert parallel; give one of them")


def _complete_graphs(compilation: Any) -> None:
    """Our layers between pieces, or no graphs."""
    if compilation.splitting_ops and SPLITTING_OP not in compilation.splitting_ops:
        compilation.splitting_ops.append(SPLITTING_OP)
    mode = compilation.cudagraph_mode
    if mode is None or mode == CUDAGraphMode.NONE:
        return
    if is_breakable_cudagraph_enabled():
        logger.warning("no graphs are captured: this model's are broken up in a way that experts here do not know")
        compilation.cudagraph_mode = CUDAGraphMode.NONE
    elif compilation.mode == CompilationMode.VLLM_COMPILE and SPLITTING_OP not in (compilation.splitting_ops or ()):
        raise ConfigError(
            "this --compilation-config captures whole graphs (fuse_attn_quant does), and with them what is decided in "
            "every step; leave it out, or give --enforce-eager"
        )
    elif mode.has_full_cudagraphs():
        logger.info("graphs are captured in pieces: experts are decided about in every step")
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
