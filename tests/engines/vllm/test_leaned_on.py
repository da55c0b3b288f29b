"""What we lean on of vLLM is there under these names: a release that renames something fails here, by name."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

MOE = "vllm.model_executor.layers.fused_moe"
ATTRIBUTES = {
    f"{MOE}.runner.moe_runner.MoERunner": {
        "forward", "_forward_impl", "_select_forward", "_quant_method", "_encode_layer_name",
    },
    f"{MOE}.RoutedExperts": {"expert_map", "forward_modular"},
    f"{MOE}.fused_moe_method_base.FusedMoEMethodBase": {
        "apply", "create_weights", "get_fused_moe_quant_config", "maybe_roundup_sizes", "mk_can_overlap_shared_experts",
    },
    f"{MOE}.router.fused_moe_router.FusedMoERouter": {"select_experts"},
    "vllm.v1.core.sched.scheduler.Scheduler": {"update_from_output", "finish_requests"},
    "vllm.v1.core.sched.async_scheduler.AsyncScheduler": {"update_from_output", "finish_requests"},
    "vllm.v1.core.kv_cache_manager.KVCacheManager": {"evict_blocks", "get_block_ids"},
    "vllm.v1.request.RequestStatus": {"FINISHED_ERROR"},
    "vllm.engine.arg_utils.EngineArgs": {"create_engine_config"},
    "vllm.model_executor.model_loader.default_loader.DefaultModelLoader": {
        "load_model", "load_weights", "create_model",
    },
    "vllm.config.CompilationConfig": {"_attention_ops"},
    "vllm.tokenizers.registry.TokenizerRegistry": {"register", "tokenizers"},
}  # fmt: skip
FIELDS = {
    "vllm.v1.outputs.ModelRunnerOutput": {"num_nans_in_logits", "sampled_token_ids", "req_id_to_index"},
    "vllm.forward_context.ForwardContext": {"attn_metadata", "no_compile_layers"},
    "vllm.config.CompilationConfig": {"splitting_ops", "cudagraph_mode"},
    "vllm.config.SchedulerConfig": {"scheduler_cls", "async_scheduling", "max_num_batched_tokens", "max_num_seqs"},
    "vllm.config.ParallelConfig": {"rank", "world_size", "enable_expert_parallel", "data_parallel_size"},
    "vllm.engine.arg_utils.EngineArgs": {
        "model", "tokenizer", "tokenizer_mode", "quantization", "load_format", "additional_config", "served_model_name",
        "compilation_config", "enforce_eager", "enable_dbo", "enable_eplb",
    },
    f"{MOE}.config.FusedMoEConfig": {
        "num_logical_experts", "experts_per_token", "hidden_dim", "intermediate_size", "moe_parallel_config",
    },
}  # fmt: skip
INITIALISED = {
    f"{MOE}.runner.moe_runner.MoERunner": {
        "router", "gate", "routed_experts", "moe_config", "_shared_experts", "_fse_fuse_gate", "_forward_entry",
    },
    f"{MOE}.RoutedExperts": {"layer_name", "moe_config", "quant_method", "apply_router_weight_on_input"},
}  # fmt: skip


def found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes(path: str) -> None:
    assert not {name for name in ATTRIBUTES[path] if not hasattr(found(path), name)}


@pytest.mark.parametrize("path", FIELDS)
def test_fields(path: str) -> None:
    assert not FIELDS[path] - {field.name for field in fields(found(path))}


@pytest.mark.parametrize("path", INITIALISED)
def test_what_constructors_set(path: str) -> None:
    text = inspect.getsource(found(path).__init__)
    assert not {name for name in INITIALISED[path] if f"self.{name} = " not in text and f"self.{name}: " not in text}


def test_the_entry_is_called_as_ours_is() -> None:
    """`_Entry.__call__` takes what `MoERunner.forward` hands it, in order."""
    text = inspect.getsource(found(f"{MOE}.runner.moe_runner.MoERunner").forward)
    call = text[text.index("self._forward_entry(") :].split()[1:6]
    assert call == [
        "hidden_states,",
        "router_logits,",
        "shared_experts_input,",
        "input_ids,",
        "self._encode_layer_name(),",
    ]


def test_splitting_ops_are_registered() -> None:
    import torch

    from hybrimoe_kt.host.vllm import runner
    from hybrimoe_kt.host.vllm.names import OP

    assert "vllm::unified_attention_with_output" in found("vllm.config.CompilationConfig")._attention_ops
    assert runner and hasattr(torch.ops.vllm, OP)
    assert hasattr(torch.ops.vllm, "moe_forward") and hasattr(torch.ops.vllm, "moe_forward_shared")
