"""Loads a model's weights from its own file: dense ones by SGLang's model, experts where they stand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.model_loader.loader import BaseModelLoader, _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel, get_schedule

from hybrimoe_kt.errors import ModelError, first_line
from hybrimoe_kt.host.engines.dense_names import dense_weights
from hybrimoe_kt.host.engines.experts import EngineExperts
from hybrimoe_kt.host.engines.gates import EngineGate, norm_before
from hybrimoe_kt.host.engines.limits import EngineLimits
from hybrimoe_kt.host.engines.model_folder import outline_of
from hybrimoe_kt.host.engines.share import RankShare
from hybrimoe_kt.host.engines.threads import cores_of_rank
from hybrimoe_kt.host.hf.sources import Source, open_source
from hybrimoe_kt.weights.gguf_file import GgufFile

from .memory import auto_bytes
from .method import HybridMethod
from .names import FILE_KEY, METHOD, OPTIONS_KEY
from .steps import watch_steps

__all__ = ["HybridLoader", "add_loader"]

logger = logging.getLogger(__name__)

_WHOLE_EXPERTS = "--ep-size"


def add_loader() -> None:
    """Have models of our method loaded here, whatever their format."""
    HookRegistry.register("sglang.srt.model_loader.loader.get_model_loader", _loader, HookType.AROUND)
    HookRegistry.register("sglang.srt.model_loader.utils.get_model_architecture", _architecture, HookType.AROUND)


def _loader(original: Any, load_config: Any, model_config: Any = None) -> Any:
    is_ours = model_config is not None and model_config.quantization == METHOD
    return HybridLoader(load_config) if is_ours else original(load_config, model_config)


def _architecture(original: Any, model_config: Any) -> Any:
    """The class for weights that are not quantised: Mixtral has another one else, which holds its own experts."""
    given = model_config.quantization
    if given != METHOD:
        return original(model_config)
    model_config.quantization = None
    try:
        return original(model_config)
    finally:
        model_config.quantization = given


class HybridLoader(BaseModelLoader):  # type: ignore[misc]
    """By our readers."""

    def download_model(self, model_config: Any) -> None:
        """Nothing: it is there."""

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        extra, device = self.load_config.model_loader_extra_config, torch.device(device_config.device)
        source = open_source(extra[FILE_KEY], None)
        outline = outline_of(source) if isinstance(source.file, GgufFile) else None
        with set_default_torch_dtype(model_config.dtype):
            with device:
                config = _get_quantization_config(model_config, self.load_config)
                model = _initialize_model(model_config, self.load_config, config)
            _load_dense(model, source, outline, model_config.dtype)
            for module in model.modules():
                if (method := getattr(module, "quant_method", None)) is not None:
                    method.process_weights_after_loading(module)
        experts = _experts(model, source, extra[OPTIONS_KEY], lambda: auto_bytes(model_config, device))
        source.file.release_pages()
        watch_steps()
        experts.start()
        logger.info("hybrimoe: dense weights are %s", model_config.dtype)
        answer: torch.nn.Module = model.eval()
        return answer


def _load_dense(model: Any, source: Source, outline: Any, dtype: torch.dtype) -> None:
    """All but routed experts. SGLang's models do not say what they were given: what stays NaN was left out."""
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    for parameter in parameters.values():
        parameter.data.fill_(float("nan"))
    model_name = f"SGLang's {type(model).__name__}"
    try:
        model.load_weights(dense_weights(source, outline, dtype))
    except (ValueError, KeyError, RuntimeError, AssertionError) as error:  # whatever its models make of other forms
        raise ModelError(
            f"{source.file.path}: {model_name} does not take these weights: {first_line(error)}"
        ) from error
    missing = sorted(name for name, value in parameters.items() if value.numel() and bool(value.isnan().all()))
    if missing:
        raise ModelError(f"{source.file.path}: nothing for {missing[0]} of {model_name}, and {len(missing) - 1} more")


def _experts(model: Any, source: Source, given: dict[str, Any], auto: Callable[[], int | None]) -> EngineExperts:
    """Hand every MoE layer of this rank its experts."""
    parallel, schedule = get_parallel(), get_schedule()
    ranks = max(1, parallel.tp_size // parallel.nnodes)
    chunk = schedule.chunked_prefill_size or 0
    limits = EngineLimits(chunk if chunk > 0 else schedule.max_prefill_tokens, parallel.tp_rank % ranks, ranks)
    found = {name: each for name, each in model.named_modules() if hasattr(each, "quant_method")}
    layers = {name: each for name, each in found.items() if isinstance(each.quant_method, HybridMethod)}
    if not layers:
        raise ModelError(f"{source.file.path}: SGLang's {type(model).__name__} has no routed experts of its own kind")
    experts = EngineExperts(limits.options(given, auto), cores_of_rank(limits.rank, limits.num_ranks))
    for name, layer in layers.items():
        mine, top_k = _mine(layer), layer.top_k
        if top_k is None:  # some models tell the router alone
            top_k = model.get_submodule(name.rpartition(".")[0]).topk.topk_config.top_k
        share = RankShare(mine, layer.moe_tp_rank, layer.moe_tp_size, _WHOLE_EXPERTS).of(
            source.loader.layer_experts(
                layer.layer_id,
                num_experts=layer.num_experts,
                top_k=top_k,
                hidden=layer.hidden_size,
                inter=layer.intermediate_size_per_partition * layer.moe_tp_size,
            )
        )
        gate = _gate(model, name, layer, mine, source)
        experts.add(share, gate, None if gate is None else gate.local_of, is_share=mine is not None)
        layer.quant_method.experts = experts
        layer.quant_method.hears_router = gate is not None or mine is None
    return experts


def _mine(layer: Any) -> list[int] | None:
    """Expert parallel: this rank's experts; None: all."""
    if layer.moe_ep_size == 1:
        return None
    first = layer.moe_ep_rank * layer.num_local_experts
    return list(range(first, first + layer.num_local_experts))


def _gate(model: Any, name: str, layer: Any, mine: list[int] | None, source: Source) -> EngineGate | None:
    """The layer's router for looking ahead; None where the block around it shows none.

    Where there is one it turns all ranks' expert numbers into this rank's, which SGLang does else.
    """
    block = model.get_submodule(name.rpartition(".")[0])
    gate = next((found for each in ("gate", "router") if callable(found := getattr(block, each, None))), None)
    topk = getattr(block, "topk", None)
    if gate is None or topk is None:
        return None

    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answer = gate(hidden)
        logits = answer[0] if isinstance(answer, tuple) else answer
        return logits, topk(hidden, logits).topk_ids

    local_of = None
    if mine is not None:
        local_of = torch.full((layer.num_experts,), -1, device=next(model.parameters()).device)
        local_of[mine] = torch.arange(len(mine), device=local_of.device)
        layer.dispatcher.skip_local_expert_mapping = True
    number = f".{layer.layer_id}."
    decoder = model.get_submodule(name[: name.index(number) + len(number) - 1])
    return EngineGate(layer.layer_id, route, norm_before(decoder, source.architecture.expert_norm), local_of)
