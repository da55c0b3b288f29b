"""The MoE method: SGLang's router and shared experts where they are, routed experts by `EngineExperts`."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import eager_on_graph
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.server_args import add_quantization_method_choices
from sglang.srt.utils import is_cuda

from hybrimoe_kt.errors import ModelError
from hybrimoe_kt.host.engines.experts import EngineExperts
from hybrimoe_kt.host.engines.quantization import WithoutFiles

from .names import METHOD
from .steps import current_step

__all__ = ["HybridMethod", "add_method"]


def add_method() -> None:
    """Make `--quantization hybrimoe` known."""
    for table in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        table.setdefault(METHOD, HybridConfig)
    add_quantization_method_choices([METHOD])


class HybridConfig(WithoutFiles, QuantizationConfig):  # type: ignore[misc]
    """Only routed experts are ours; everything else is not quantised."""

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        # at the top it would be a circle, as SGLang's own methods have it
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        if isinstance(layer, FusedMoE) and not layer.is_shared_fused_moe:
            return HybridMethod()
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class HybridMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Of one layer. Its experts come from the model's file, by the loader: there are no parameters."""

    def __init__(self) -> None:
        self.experts: EngineExperts | None = None
        self.hears_router = True
        """Whether its logits can be told apart by rank."""
        self.factor = 1.0
        """Of the answer, where SGLang's model leaves it to the experts."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """None: the loader hands over views of the file."""

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """None, and with it ids of this rank's experts, in the standard form."""
        if moe_runner_config.no_combine:
            raise ModelError(f"layer {layer.layer_id}: SGLang's model adds its experts' answers up itself")
        self.runner = None
        self._weights_go_on_input: bool = moe_runner_config.apply_router_weight_on_input
        if is_cuda():  # as its own experts have it: on other devices the model multiplies
            self.factor = moe_runner_config.routed_scaling_factor or 1.0

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """This rank's part of the layer for `dispatch_output.hidden_states [rows, hidden]`."""
        x, (weights, ids, logits, *_) = dispatch_output.hidden_states, dispatch_output.topk_output
        if not is_in_breakable_cuda_graph():
            return StandardCombineInput(hidden_states=self._run(layer.layer_id, x, weights, ids, logits))
        out = torch.empty_like(x)  # memory of the graph's piece before us: the piece behind reads there
        _run_into(self, layer.layer_id, x, weights, ids, logits, out)
        return StandardCombineInput(hidden_states=out)

    def _run(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor | None
    ) -> torch.Tensor:
        experts = self.experts
        assert experts is not None, "the loader has handed them over"
        if self._weights_go_on_input:
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        if logits is not None and self.hears_router and experts.wants_logits:
            experts.note_logits(logits)
        return experts.run(layer, x, ids, weights * self.factor, current_step())


@eager_on_graph(capture_stub=lambda *args, **kwargs: None)  # type: ignore[untyped-decorator]
def _run_into(method: HybridMethod, layer: int, x: Any, weights: Any, ids: Any, logits: Any, out: Any) -> None:
    """Between two pieces of a graph, anew in every step."""
    out.copy_(method._run(layer, x, weights, ids, logits))
