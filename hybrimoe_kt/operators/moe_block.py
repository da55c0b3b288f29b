"""`MoEBlock`: a MoE block whose shared experts run while the CPU computes its share of the routed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.row_kernels import check_kernel
from hybrimoe_kt.errors import ConfigError

from .pending_sum import PendingSum, pending

__all__ = ["MoEBlock"]


class MoEBlock(nn.Module):
    """In place of a model's own MoE block, where that has shared experts: adopts its modules and their names.

    The block is the sum of routed and shared experts, in this order. A host leaves all others as they are, dense layers
    among them.
    """

    gate: Any
    experts: Any

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
        kernel: str = "auto",
        shared_name: str = "",
        router_inputs: Sequence[str] = (),
    ) -> None:
        """`shared_name` is what the block calls its shared experts, `router_inputs` what it gives its router besides.

        `kernel` as of FusedRMSNorm: where it is Triton's, the next norm adds both up, see `PendingSum`.
        """
        super().__init__()
        self.check_kwargs({"kernel": kernel})
        self.kernel = kernel
        if getattr(orig_module, shared_name, None) is None:
            raise ConfigError(
                f"{key}: MoEBlock replaces a MoE block with shared experts, found {type(orig_module).__name__}"
            )
        self._shared_name, self._router_inputs = shared_name, tuple(router_inputs)
        self._routes_by_id = bool(getattr(orig_module, "is_hash", False))
        for name, child in orig_module.named_children():
            self.register_module(name, child)
        for parts in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[parts] = orig_module.__dict__[parts]

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kernel(kwargs.get("kernel", "auto"))

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor | PendingSum:
        """`[batch, tokens, hidden]` -> the same; an error between the two doors leaves the step to be abandoned.

        The tokens' ids `[batch, tokens]` are for routers that choose by them.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        further = [getattr(self, name) for name in self._router_inputs]
        further += [input_ids] if self._routes_by_id else []
        _, weights, ids = self.gate(flat, *further)  # called, as a hook notes the logits
        job = self.experts.begin(flat, ids, weights)
        shared = self._shared(flat)
        routed: torch.Tensor = self.experts.finish(job)
        answer: torch.Tensor | PendingSum = pending(
            routed.view(hidden_states.shape), shared.view(hidden_states.shape), kernel=self.kernel
        )
        return answer

    def _shared(self, flat: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = getattr(self, self._shared_name)(flat)
        gate = self._modules.get("shared_expert_gate")
        return answer if gate is None else functional.sigmoid(gate(flat)) * answer
