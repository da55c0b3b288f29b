"""Loads a model's weights from its own file: dense ones by vLLM's model, experts where they stand."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import replace
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from hybrimoe_kt.errors import ModelError, first_line
from hybrimoe_kt.host.engines.dense_names import dense_weights
from hybrimoe_kt.host.engines.experts import EngineExperts, experts_of_rank
from hybrimoe_kt.host.engines.gates import norm_before
from hybrimoe_kt.host.engines.limits import EngineLimits
from hybrimoe_kt.host.engines.model_folder import outline_of
from hybrimoe_kt.host.engines.share import RankShare
from hybrimoe_kt.host.engines.threads import cores_of_rank
from hybrimoe_kt.host.hf.sources import Source, open_source
from hybrimoe_kt.weights.gguf_file import GgufFile

from .memory import auto_bytes
from .method import HybridMethod
from .names import FILE_KEY, METHOD, OPTIONS_KEY
from .orphans import end_with_server
from .runner import attach, gate_of, tell_lost_steps
from .steps import StepReader

__all__ = ["HybridLoader", "add_loader"]

logger = init_logger("vllm.hybrimoe")

_WHOLE_EXPERTS = "--enable-expert-parallel"


def add_loader() -> None:
    """Make `--load-format hybrimoe` known."""
    if METHOD not in _LOAD_FORMAT_TO_MODEL_LOADER:
        register_model_loader(METHOD)(HybridLoader)


class HybridLoader(DefaultModelLoader):  # type: ignore[misc]
    """The target model by our readers; draft models, which are others, as vLLM loads them."""

    def __init__(self, load_config: Any) -> None:
        super().__init__(replace(load_config, load_format="auto"))
        self._outline: Any = None
        """The model as Transformers has it, where weights have its names."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        self._config = vllm_config
        model: torch.nn.Module = super().load_model(vllm_config, model_config, prefix)
        if not _is_draft(model_config):
            _start(model, vllm_config)
        return model

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        if not _is_draft(model_config):
            self._source = open_source(vllm_config.additional_config[FILE_KEY], None)
            if isinstance(self._source.file, GgufFile):
                # before vLLM changes classes of Transformers, as it does for some models
                self._outline = outline_of(self._source)
        model: torch.nn.Module = super().create_model(vllm_config, model_config, prefix)
        return model

    def load_weights(self, model: Any, model_config: Any) -> None:
        if _is_draft(model_config):
            super().load_weights(model, model_config)
            return
        source = self._source
        _add_experts(model, source, self._config)
        try:
            loaded = model.load_weights(dense_weights(source, self._outline, model_config.dtype))
        except (ValueError, KeyError, RuntimeError) as error:  # whatever its models make of weights of another form
            raise ModelError(
                f"{source.file.path}: vLLM's {type(model).__name__} does not take these weights: {first_line(error)}"
            ) from error
        missing = [] if loaded is None else _missing(model, loaded)
        if missing:
            raise ModelError(
                f"{source.file.path}: nothing for {missing[0]} of vLLM's model, and {len(missing) - 1} more"
            )
        source.file.release_pages()


def _missing(model: torch.nn.Module, loaded: set[str]) -> list[str]:
    """Parameters that nothing was loaded for under any of their names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each[0] for each in names.values() if loaded.isdisjoint(each)]


def _is_draft(model_config: Any) -> bool:
    """Whether the model only guesses tokens for another."""
    return bool(model_config.runner_type == "draft")


def _add_experts(model: torch.nn.Module, source: Source, config: Any) -> None:
    """Hand every MoE layer of this rank its experts."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, MoERunner)}
    runners = {name: each for name, each in found.items() if isinstance(each._quant_method, HybridMethod)}
    if not runners:
        if get_pp_group().world_size == 1:
            raise ModelError(f"{source.file.path}: vLLM's {type(model).__name__} has no routed experts of its own kind")
        return
    layers = {name: _share(runner, source) for name, runner in runners.items()}
    limits = _limits(config)
    options = limits.options(config.additional_config[OPTIONS_KEY], lambda: auto_bytes(config))
    has_others = config.parallel_config.data_parallel_size > 1  # whose requests are in the step as well
    cores = cores_of_rank(limits.rank, limits.num_ranks)
    experts = EngineExperts(options, cores, tells_by_answer=has_others)
    guessing = config.speculative_config
    ahead = guessing.num_speculative_tokens if guessing is not None else 0
    reader = StepReader(tokens_a_request=1 + ahead, sees_other_ranks=has_others)
    for name, runner in runners.items():
        block = model.get_submodule(name.rpartition(".")[0])
        number = runner._quant_method.layer_number
        decoder = model.get_submodule(name[: name.index(f".{number}.") + len(f".{number}")])
        gate = gate_of(runner, number, block, norm_before(decoder, source.architecture.expert_norm))
        experts.add(layers[name], gate, runner.routed_experts.expert_map)
        attach(runner, experts, reader)


def _limits(config: Any) -> EngineLimits:
    """This rank among those of its machine, data-parallel ones as well."""
    parallel = config.parallel_config
    in_engine = max(1, parallel.local_world_size)
    engine = parallel.data_parallel_rank_local or 0
    num_ranks = in_engine * max(1, parallel.data_parallel_size_local)
    return EngineLimits(
        config.scheduler_config.max_num_batched_tokens, engine * in_engine + parallel.rank % in_engine, num_ranks
    )


def _share(runner: Any, source: Source) -> Any:
    """What this rank computes of a layer."""
    moe, mapped = runner.moe_config, runner.routed_experts.expert_map
    whole = source.loader.layer_experts(
        runner._quant_method.layer_number,
        num_experts=moe.num_logical_experts,
        top_k=moe.experts_per_token,
        hidden=moe.hidden_dim,
        inter=moe.intermediate_size,
    )
    if mapped is not None:
        return RankShare(experts_of_rank(mapped.tolist())).of(whole)
    return RankShare(None, moe.tp_rank, moe.tp_size, _WHOLE_EXPERTS).of(whole)


def _start(model: torch.nn.Module, config: Any) -> None:
    methods = [m._quant_method for m in model.modules() if isinstance(m, MoERunner)]
    experts = next((m.experts for m in methods if isinstance(m, HybridMethod) and m.experts is not None), None)
    tell_lost_steps(model, experts)
    if experts is not None:
        runtime = experts.start()
        end_with_server()
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        logger.info(
            "hybrimoe: %s; dense weights are %s, made of the file's for vLLM's own layers", runtime.describe(), dtype
        )
