"""What we lean on of SGLang is there under these names: a release that renames something fails here, by name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

pytest.importorskip("sglang", reason="SGLang is not installed; docs/engines.md")

SRT = "sglang.srt"
PARAMETERS = {
    f"{SRT}.model_loader.loader.get_model_loader": ["load_config", "model_config"],
    f"{SRT}.model_loader.utils.get_model_architecture": ["model_config"],
    f"{SRT}.model_loader.loader._get_quantization_config": ["model_config", "load_config"],
    f"{SRT}.model_executor.model_runner.ModelRunner.sample": ["self", "logits_output", "forward_batch"],
    f"{SRT}.model_executor.forward_context.forward_context": ["ctx", "forward_batch"],
}
BEGINNINGS = {
    f"{SRT}.model_loader.loader._initialize_model": ["model_config", "load_config", "quant_config"],
    f"{SRT}.model_executor.model_runner.ModelRunner._forward_raw": ["self", "forward_batch"],
    f"{SRT}.layers.moe.topk.TopK.forward": ["self"],
}
RESULTS = f"{SRT}.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
SOURCES: dict[str, set[str]] = {
    f"{SRT}.layers.moe.fused_moe_triton.layer.FusedMoE.__init__": {
        "self.layer_id = ", "self.num_experts = ", "self.num_local_experts = ", "self.top_k = ", "self.hidden_size = ",
        "self.intermediate_size_per_partition = ", "self.moe_ep_rank = ", "self.moe_tp_rank = ", "self.dispatcher = ",
        "self.quant_method = ",
    },
    f"{SRT}.layers.moe.topk.TopK.__init__": {"self.topk_config = "},
    f"{SRT}.layers.moe.token_dispatcher.standard.StandardDispatcher.dispatch": {"not self.skip_local_expert_mapping"},
    f"{SRT}.managers.schedule_batch.Req.__init__": {"self.skip_radix_cache_insert = ", "self.to_finish: "},
    f"{SRT}.managers.schedule_batch.Req.update_finish_state": {"self.finished_reason = self.to_finish"},
    f"{SRT}.mem_cache.common.release_kv_cache": {"req.skip_radix_cache_insert"},
    f"{SRT}.mem_cache.common.checkpoint_kv_cache": {"req.skip_radix_cache_insert"},
    f"{SRT}.model_executor.forward_batch_info.ForwardBatch": {"global_num_token_non_padded_cpu", "forward_mode"},
    f"{RESULTS}.process_batch_result_prefill": {"batch: ", "result: "},
    f"{RESULTS}.process_batch_result_decode": {"batch: ", "result: "},
}  # fmt: skip
ARGUMENTS = {
    "enable_two_batch_overlap", "enable_single_batch_overlap", "moe_a2a_backend", "enable_eplb", "init_expert_location",
    "ep_num_redundant_experts", "enable_paged_experts", "kt_weight_path", "startup_weight_load_mode", "pp_size",
    "dp_size", "attn_dp_size", "speculative_algorithm", "disable_overlap_schedule", "disable_shared_experts_fusion",
    "model_loader_extra_config", "cuda_graph_config",
}  # fmt: skip


def found(path: str) -> Any:
    parts = path.split(".")
    for place in range(len(parts) - 1, 0, -1):
        try:
            each: Any = importlib.import_module(".".join(parts[:place]))
        except ModuleNotFoundError:
            continue
        for name in parts[place:]:
            each = getattr(each, name)
        return each
    raise AssertionError(path)


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters(path: str) -> None:
    assert list(inspect.signature(found(path)).parameters) == PARAMETERS[path]


@pytest.mark.parametrize("path", BEGINNINGS)
def test_first_parameters(path: str) -> None:
    wanted = BEGINNINGS[path]
    assert list(inspect.signature(found(path)).parameters)[: len(wanted)] == wanted


@pytest.mark.parametrize("path", SOURCES)
def test_names_inside(path: str) -> None:
    text = inspect.getsource(found(path))
    assert not {name for name in SOURCES[path] if name not in text}


def test_arguments() -> None:
    from sglang.srt.arg_groups.arg_utils import field_names
    from sglang.srt.server_args import ServerArgs

    assert not ARGUMENTS - set(field_names(ServerArgs))
