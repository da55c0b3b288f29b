"""Routed experts in kTransformers' fork of SGLang, sglang-kt 0.7.2. UNTESTED: the fork does not import without CUDA.

    HYBRIMOE='{"file": "FILE.gguf", "cache_size": "12GiB"}' SGLANG_EXTERNAL_MODEL_PACKAGE=hybrimoe_kt.host.sglang \\
        python -m sglang.launch_server --model-path CHECKPOINT --disable-cuda-graph --disable-shared-experts-fusion

Written after its sources alone. The fork imports each module of that package (and passes over the others here, which
are for SGLang's main line); this one puts itself in place of every layer's experts by `register_moe_quant_wrapper`.
Dense weights, and the tokenizer, are those of CHECKPOINT, by the fork's own loader; experts are read from the file,
which may be the checkpoint itself. What is padding and which steps are decode is not known here, and a step that fails
gives tokens that mean nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from sglang.srt.distributed import get_tensor_model_parallel_rank
from sglang.srt.layers.moe.quant_method_registry import register_moe_quant_wrapper
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from hybrimoe_kt.errors import ConfigError
from hybrimoe_kt.host.engines.experts import EngineExperts, EngineStep
from hybrimoe_kt.host.engines.limits import EngineLimits
from hybrimoe_kt.host.engines.share import RankShare
from hybrimoe_kt.host.engines.threads import cores_of_rank
from hybrimoe_kt.host.hf.sources import open_source

__all__: list[str] = []

_VARIABLE = "HYBRIMOE"


class _Model:
    """Of a process: the experts of all layers, started when the last of them is there."""

    def __init__(self, given: dict[str, Any], server_args: Any) -> None:
        options = dict(given)
        if not isinstance(file := options.pop("file", None), str):
            raise ConfigError(f'{_VARIABLE} has no "file", valid: {{"file": "FILE.gguf", "cache_size": "12GiB", ...}}')
        self.source = open_source(file, None)
        chunk, ranks = server_args.chunked_prefill_size or 0, server_args.tp_size // server_args.nnodes
        rank = get_tensor_model_parallel_rank() % ranks
        limits = EngineLimits(chunk if chunk > 0 else server_args.max_prefill_tokens, rank, ranks)
        self.experts = EngineExperts(limits.options(options), cores_of_rank(rank, ranks))
        self.num_layers = 0


class _Method(FusedMoEMethodBase):  # type: ignore[misc]
    """In place of the fork's own."""

    def __init__(self, model: _Model) -> None:
        self._model = model
        model.num_layers += 1

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """None: they are views of the file."""

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        self._factor: float = moe_runner_config.routed_scaling_factor or 1.0

    def process_weights_after_loading(self, layer: Any) -> None:
        experts, first = self._model.experts, layer.moe_ep_rank * layer.num_local_experts
        is_share = layer.moe_ep_size > 1
        mine = list(range(first, first + layer.num_local_experts)) if is_share else None
        whole = self._model.source.loader.layer_experts(
            layer.layer_id,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            hidden=layer.hidden_size,
            inter=layer.intermediate_size_per_partition * layer.moe_tp_size,
        )
        experts.add(RankShare(mine, layer.moe_tp_rank, layer.moe_tp_size, "--ep-size").of(whole), is_share=is_share)
        if len(experts.layers) == self._model.num_layers:
            experts.start()

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """The dispatcher has turned ids into this rank's."""
        x, (weights, ids, *_) = dispatch_output.hidden_states, dispatch_output.topk_output
        answer: torch.Tensor = self._model.experts.run(layer.layer_id, x, ids, weights * self._factor, EngineStep())
        return StandardCombineInput(hidden_states=answer)


_models: list[_Model] = []


def _wanted(layer: Any, server_args: Any) -> _Model | None:
    if _VARIABLE not in os.environ:
        return None
    if not server_args.disable_cuda_graph or not server_args.disable_shared_experts_fusion:
        raise ConfigError(f"{_VARIABLE} needs --disable-cuda-graph and --disable-shared-experts-fusion")
    if not _models:
        _models.append(_Model(json.loads(os.environ[_VARIABLE]), server_args))
    return _models[0]


register_moe_quant_wrapper("hybrimoe", _wanted, lambda layer, method, model: _Method(model), priority=1000)
