"""What of SGLang's arguments follows from ours, at two steps of how it resolves them: model paths, and graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError, ModelError
from hybrimoe_kt.host.engines.model_folder import has_tokenizer, model_folder

from .names import FILE_KEY, METHOD, OPTIONS_KEY

__all__ = ["extend_arguments"]

_EXTRA = "--model-loader-extra-config"
_REFUSED: dict[str, tuple[object, str]] = {
    "enable_two_batch_overlap": (False, "has two halves of a batch under way, of experts one step at a time is"),
    "enable_single_batch_overlap": (False, "computes around kernels of SGLang's own experts"),
    "moe_a2a_backend": ("none", "sends tokens to experts in a form that is not read here"),
    "enable_eplb": (False, "moves experts between ranks, which are read in place here"),
    "init_expert_location": ("trivial", "moves experts between ranks, which are read in place here"),
    "ep_num_redundant_experts": (0, "copies experts, which are read in place here"),
    "enable_paged_experts": (False, "is another way to hold experts"),
    "kt_weight_path": (None, "is another way to hold experts"),
    "startup_weight_load_mode": ("serial", "loads with SGLang's own loader"),
    "pp_size": (1, "has not been tried with hybrimoe"),
    "dp_size": (1, "has not been tried with hybrimoe"),
    "attn_dp_size": (1, "has not been tried with hybrimoe"),
    "speculative_algorithm": (None, "has not been tried with hybrimoe"),
}
"""Field -> the value that works, and what another one does."""
_LOAD_FORMATS = ("auto", "safetensors")


def extend_arguments() -> None:
    """Take part in SGLang's resolution of arguments; once a process."""
    register_resolution_hook("handle_model_source_paths")(_model)
    register_resolution_hook("handle_cuda_graph_config")(_graphs)


def _model(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Name our method, and the folder that describes the model; ConfigError or ModelError."""
    args = resolving_view(server_args)
    extra = _extra(args)
    if args.quantization == METHOD or OPTIONS_KEY in extra:
        declare_resolution(server_args, METHOD, **_resolved(args, extra))
    previous(server_args)


def _extra(args: Any) -> dict[str, Any]:
    given = args.model_loader_extra_config or {}
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"""{_EXTRA} is {given!r}, valid: '{{"{OPTIONS_KEY}": {{"cache_size": "12GiB", ...}}}}'""")
    return found


def _resolved(args: Any, extra: dict[str, Any]) -> dict[str, Any]:
    options = extra.get(OPTIONS_KEY, {})
    if not isinstance(options, dict):
        raise ConfigError(f'{_EXTRA}: "{OPTIONS_KEY}" is {options!r}, valid: {{"cache_size": "12GiB", ...}}')
    ExpertOptions.from_kwargs(options)
    if args.quantization not in (None, METHOD):
        raise ConfigError(f"--quantization {args.quantization} beside {_EXTRA} for {METHOD}; leave one of them out")
    if args.load_format not in _LOAD_FORMATS:
        raise ConfigError(f"--load-format {args.load_format} is not read here, valid: {', '.join(_LOAD_FORMATS)}")
    for name, (works, reason) in _REFUSED.items():
        if (value := getattr(args, name)) != works and value:
            raise ConfigError(f"--{name.replace('_', '-')} {value} {reason}; leave it out")
    if not Path(args.model_path).exists():
        raise ModelError(f"{args.model_path}: no such file or directory; download the model first, and give its folder")
    file = str(Path(args.model_path).resolve())
    folder = model_folder(file)
    if not (has_tokenizer(folder) or args.tokenizer_path or args.skip_tokenizer_init):
        raise ModelError(
            f"{file}: its tokenizer merges as SentencePiece does, which SGLang cannot read from a file of ours; give "
            "--tokenizer-path with the original model's folder"
        )
    return {
        "quantization": METHOD,
        "model_path": str(folder),
        "tokenizer_path": args.tokenizer_path or str(folder),
        "served_model_name": args.served_model_name or (Path(file).stem if file.endswith(".gguf") else args.model_path),
        "model_loader_extra_config": json.dumps({**extra, OPTIONS_KEY: options, FILE_KEY: file}),
        "disable_shared_experts_fusion": True,  # the file's shared experts are the model's own layers
        "disable_overlap_schedule": True,  # else a step that failed is known after its prefix is kept
    }


def _graphs(server_args: Any, previous: Callable[[Any], None]) -> None:
    """No graphs, but for those that break where our layers are, where the user asks for them; ConfigError."""
    previous(server_args)
    args = resolving_view(server_args)
    if args.quantization != METHOD:
        return
    for phase in Phase.ALL:
        backend = getattr(args.cuda_graph_config, phase).backend
        if (phase, "backend") not in server_args._cuda_graph_config_locked:
            config = with_phase(args.cuda_graph_config, phase, backend=Backend.DISABLED)
            declare_resolution(server_args, METHOD, cuda_graph_config=config)
        elif backend not in (Backend.BREAKABLE, Backend.DISABLED):
            raise ConfigError(
                f"--cuda-graph-backend-{phase} {backend} would capture decisions that the host makes anew in every "
                f"step; give --cuda-graph-backend-{phase} {Backend.BREAKABLE}, or leave it out"
            )
