"""Where a model comes from, a GGUF file or a Hugging Face checkpoint, brought to one shape for loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from hybrimoe_kt.errors import ConfigError, ModelError, first_line
from hybrimoe_kt.host.config_file import read_config
from hybrimoe_kt.weights.checkpoint import Checkpoint, is_checkpoint
from hybrimoe_kt.weights.checkpoint_experts import CheckpointLoader
from hybrimoe_kt.weights.expert_layers import num_layers
from hybrimoe_kt.weights.gguf_file import GgufFile
from hybrimoe_kt.weights.gguf_loader import GgufLoader
from hybrimoe_kt.weights.lazy import LazyTensor, Where

from .architectures import Architecture, architecture_of, architecture_of_type
from .architectures.rotary import Rotary
from .dense_weights import dense_state_dict, packed_weight

__all__ = ["Source", "experts_of", "open_source"]

State = Callable[[Mapping[str, tuple[int, ...]], torch.dtype, Where], dict[str, LazyTensor]]


@dataclass(frozen=True, slots=True)
class Source:
    """A model before it is built; `state(parameters, dtype, where)` gives its dense weights, lazily."""

    file: GgufFile | Checkpoint
    architecture: Architecture
    config: Any
    loader: GgufLoader | CheckpointLoader
    state: State
    rotary: Rotary | None = None
    """How the file has positions rotated, where the configuration does not say it."""
    checkpoint_type: str = ""
    """Of `Architecture`, where names are a checkpoint's."""


def open_source(path: str | Path, model_path: str | Path | None, metadata: Mapping[str, Any] | None = None) -> Source:
    """Open a GGUF model, or a directory of safetensors; `model_path` is where its configuration is read from.

    `metadata` takes the place of the GGUF file's own; ConfigError where there is none.
    """
    if not is_checkpoint(path):
        return _gguf(path, model_path, metadata or {})
    if metadata:
        raise ConfigError(f"{path}: --override-kv changes the metadata of GGUF files; change config.json here")
    return _checkpoint(path, model_path)


def _gguf(path: str | Path, model_path: str | Path | None, metadata: Mapping[str, Any]) -> Source:
    file = GgufFile(path, metadata)
    architecture = architecture_of(file)
    config = _config(file, architecture, model_path)
    _check_consistent(file, architecture, config)

    def state(parameters: Mapping[str, tuple[int, ...]], dtype: torch.dtype, where: Where) -> dict[str, LazyTensor]:
        return dense_state_dict(file, architecture, parameters, dtype, where)

    rotary = architecture.rotary(file) if model_path is None else None
    loader = GgufLoader(file, partial(packed_weight, file, architecture), partial(architecture.expert_form, config))
    return Source(file, architecture, config, loader, state, rotary)


def experts_of(file: GgufFile) -> GgufLoader:
    """What hands out a file's experts alone, also of a file that nothing else could be made of.

    ModelError for an architecture that is not supported, or experts of an unknown form.
    """
    architecture = architecture_of(file)
    config = _config_from_metadata(file, architecture)
    return GgufLoader(file, form_of=partial(architecture.expert_form, config))


def _checkpoint(path: str | Path, model_path: str | Path | None) -> Source:
    config = _directory_config(Path(model_path or path))
    architecture = architecture_of_type(str(path), config.model_type)
    file = Checkpoint(path, architecture.checkpoint_names)
    quantized = config.__dict__.pop("quantization_config", None) or {}  # of the files; the model is not told
    file.scale_block = tuple(quantized.get("weight_block_size") or file.scale_block)

    def state(parameters: Mapping[str, tuple[int, ...]], dtype: torch.dtype, where: Where) -> dict[str, LazyTensor]:
        return file.dense_state(dtype, architecture.float32, where)

    loader = CheckpointLoader(file, partial(architecture.expert_form, config))
    return Source(file, architecture, config, loader, state, checkpoint_type=architecture.checkpoint_type)


def _config(file: GgufFile, architecture: Architecture, model_path: str | Path | None) -> Any:
    if model_path is None:
        return _config_from_metadata(file, architecture)
    config = _directory_config(Path(model_path))
    if config.model_type != architecture.model_type:
        raise ModelError(
            f"{model_path} describes a {config.model_type} model, {file.path} holds {architecture.gguf} "
            f"({architecture.model_type}); they belong to different models"
        )
    config.__dict__.pop("quantization_config", None)  # it describes other files than the GGUF
    return config


def _directory_config(path: Path) -> Any:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json there; --model_path takes a local model directory, or leave it out")
    try:
        return read_config(path)
    except Exception as error:  # whatever a file may hold that is no configuration
        raise ModelError(f"{path}/config.json cannot be used: {first_line(error)}") from None


def _check_consistent(file: GgufFile, architecture: Architecture, config: Any) -> None:
    """Refuse a configuration that would silently run another model than the file holds, or build one without end."""
    found = num_layers(file)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    stated = architecture.key(file)("expert_used_count")
    if config.num_hidden_layers != found:
        raise ModelError(f"{file.path}: holds {found} layers, its configuration says {config.num_hidden_layers}")
    routed = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)  # Gemma's
    if routed != stated or not (isinstance(stated, int) and 1 <= stated <= (experts or stated)):
        raise ModelError(
            f"{file.path}: routes each token to {stated} of {experts} experts, its configuration says {routed}"
        )
    groups, used = (getattr(config, name, None) or 1 for name in ("n_group", "topk_group"))
    if experts and (experts % groups or not 1 <= used <= groups):
        raise ModelError(f"{file.path}: {experts} experts cannot be routed by {used} of {groups} groups")


def _config_from_metadata(file: GgufFile, architecture: Architecture) -> Any:
    try:
        values = architecture.config(file)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(f"{file.path}: its metadata describes no usable model: {first_line(error)}") from None
