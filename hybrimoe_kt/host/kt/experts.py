"""`HybriMoEExperts` for the legacy framework's rule files: in place of `KTransformersExperts`.

- match:
    name: ^model\\.layers\\..*\\.mlp\\.experts$
  replace:
    class: hybrimoe_kt.host.kt.experts.HybriMoEExperts
    kwargs: {prefill_device: cuda, generate_device: cpu}
  recursive: False
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hybrimoe_kt.config import ExpertOptions
from hybrimoe_kt.errors import ConfigError, ModelError
from hybrimoe_kt.runtime import Job, Routed, Runtime

from .framework import BaseInjectedModule, KExpertsBase, expert_threads, float32_default, refuse_capture
from .shared import Shared
from .weights import layer_experts, layer_number

__all__ = ["HybriMoEExperts"]

# Options of KTransformersExperts that choose among its own implementations.
_IGNORED = ("prefill_op", "generate_op")


class HybriMoEExperts(BaseInjectedModule, KExpertsBase):  # type: ignore[misc]
    """Routed experts of one layer, handed step by step to the model's `Runtime`.

    `kwargs` are the options of `ExpertOptions`, beside the framework's own; the CPU's share runs on the framework's
    `cpuinfer_ext` unless `cpu_backend` says otherwise, with its `--cpu_infer` threads. There is one mode: the same
    weights serve prefill and generation. The framework keeps attributes on the module it replaces, these stay here.
    """

    layer: int
    shared: Shared
    logits: torch.Tensor | None
    out_device: str | None
    loaded: bool

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str = "cuda",
        generate_device: str = "cpu",
        out_device: str | None = None,
        **kwargs: Any,
    ) -> None:
        BaseInjectedModule.__init__(self, key, gguf_loader, config, orig_module, prefill_device, generate_device)
        activation = getattr(config, "hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"{key}: experts with activation {activation!r} are not supported; silu is")
        if not isinstance(orig_module, nn.ModuleList):
            raise ConfigError(
                f"{key}: HybriMoEExperts replaces a layer's routed experts, found {type(orig_module).__name__}"
            )
        options = {name: value for name, value in kwargs.items() if name not in _IGNORED}
        defaults = {"cpu_backend": "cpuinfer", "cpu_threads": expert_threads()}
        chosen = ExpertOptions.from_kwargs(defaults | options)
        self._keep("layer", layer_number(key))
        self._keep("shared", Shared.by(gguf_loader))
        self.shared.experts.agree(chosen, key)
        self._keep("logits", None)
        self._keep("out_device", out_device)
        self._keep("loaded", False)
        # The framework's blocks ask these for CUDA-graph submission, which there is none of.
        self._keep("generate_experts", None)
        self._keep("prefill_experts", None)

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def load(self, w: Any = None, mode: Any = None, warmup: bool = False) -> None:
        """Take the layer's weights in place. The framework also calls this to change modes: that changes nothing."""
        if self.loaded:
            return
        experts = layer_experts(
            self.gguf_loader, self.layer, num_experts=len(self.orig_module), top_k=self.config.num_experts_per_tok
        )
        self.shared.experts.add(experts)
        self._keep("loaded", True)

    @property
    def runtime(self) -> Runtime:
        """What computes the model's experts, once all are loaded."""
        return self.shared.runtime

    def note_logits(self, logits: torch.Tensor) -> None:
        """Take the router's logits `[tokens, experts]` of the step about to come."""
        self._keep("logits", logits)

    def unload(self) -> None:
        """Keep everything: what another mode needs is the same."""

    def set_inference_mode(self, mode: Any) -> None:
        """Accept the framework's change of mode; weights are read where they are in both."""

    def forward(
        self, input_tensor: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """`input_tensor [tokens, hidden]`, ids and weights `[tokens, top_k]` -> `[tokens, hidden]`, its type kept."""
        return self.finish(self.begin(input_tensor, expert_ids, weights))

    def begin(self, input_tensor: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Job:
        """Start what `forward` does; what is computed until `finish` runs beside the CPU's share."""
        refuse_capture("HybriMoEExperts")
        routed = Routed(input_tensor, expert_ids.long(), weights, self.logits)
        self._keep("logits", None)
        with float32_default():
            return self.runtime.begin(self.layer, routed)

    def finish(self, job: Job) -> torch.Tensor:
        """Wait for what `begin` started, and return its answer."""
        with float32_default():
            result = self.runtime.finish(job)
        return result if self.out_device is None else result.to(self.out_device)
