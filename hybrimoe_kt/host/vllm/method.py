"""The MoE method: vLLM's router and shared experts where they are, routed experts by `EngineExperts`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import extract_layer_index

from hybrimoe_kt.host.engines.experts import EngineExperts
from hybrimoe_kt.host.engines.quantization import WithoutFiles

from .names import METHOD
from .steps import StepReader

__all__ = ["HybridMethod", "add_method"]


def add_method() -> None:
    """Make `--quantization hybrimoe` known."""
    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(HybridConfig)


class HybridConfig(WithoutFiles, QuantizationConfig):  # type: ignore[misc]
    """Only routed experts are ours; everything else keeps the method that it would have had."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return HybridMethod(layer)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class HybridMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Of one layer. Its experts come from the model's file, by the loader: there are no parameters."""

    def __init__(self, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.layer_number: int = extract_layer_index(layer.layer_name)
        self.experts: EngineExperts | None = None
        self.reader: StepReader | None = None
        """All layers' alike: a step is read once."""
        self._weights_go_on_input: bool = layer.apply_router_weight_on_input

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """None: the loader hands over views of the file."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def maybe_roundup_sizes(self, hidden_size: int, inter: int, *_: Any, **__: Any) -> tuple[int, int]:
        """As they are."""
        return hidden_size, inter

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """`apply` computes shared experts beside the CPU's share."""
        return True

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x [rows, hidden]`, weights and global ids `[rows, top_k]` -> `[rows, hidden]`, this rank's part of it."""
        assert self.experts is not None and self.reader is not None, "the loader has handed them over"
        if self._weights_go_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        step = self.reader.step(get_forward_context())
        begun = self.experts.begin(self.layer_number, x, topk_ids, topk_weights, step)
        if shared_experts is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        return self.experts.finish(begun)
