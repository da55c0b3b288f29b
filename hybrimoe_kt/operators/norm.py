"""`FusedRMSNorm`: a norm by root mean square as one launch, with the residual additions before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from hybrimoe_kt.backends.row_asking import Norm, NormForm, is_torchs_norm, norm_form
from hybrimoe_kt.backends.row_kernels import check_kernel, is_used, norm, norm_of_sum, takes_rows, takes_sum
from hybrimoe_kt.errors import ConfigError

from .adopted import Adopted
from .pending_sum import PendingSum

__all__ = ["FusedRMSNorm"]


_T = TypeVar("_T")
_forms: dict[type[nn.Module], NormForm | None] = {}
_are_torchs: dict[type[nn.Module], bool] = {}


class FusedRMSNorm(Adopted):
    """In place of any family's RMSNorm; what that is exactly is found out by asking it. Others stay as they are."""

    weight: nn.Parameter

    def __init__(
        self,
        key: str,
        gguf_loader: Any,
        config: Any,
        orig_module: nn.Module,
        prefill_device: str | None = None,
        generate_device: str | None = None,
        kernel: str = "auto",
    ) -> None:
        """`kernel`: "triton", "torch", or "auto", which is Triton's on a GPU and torch's anywhere else."""
        self.check_kwargs({"kernel": kernel})
        weight = getattr(orig_module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            raise ConfigError(f"{key}: FusedRMSNorm replaces a norm, found {type(orig_module).__name__}")
        super().__init__(orig_module)
        self.kernel = kernel

    @classmethod
    def check_kwargs(cls, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for kwargs this operator would refuse, without building it."""
        check_kernel(kwargs.get("kernel", "auto"))

    @property
    def epsilon(self) -> float:
        """Added to the mean square; families call it differently."""
        return float(getattr(self, "variance_epsilon", None) or getattr(self, "eps", 0.0) or 0.0)

    def forward(self, hidden_states: torch.Tensor | PendingSum, *args: Any) -> torch.Tensor:
        """`[..., width]` -> the same, in the same dtype; a sum that is pending is known afterwards."""
        if isinstance(hidden_states, PendingSum):
            if len(hidden_states.terms) > 1 and not args and (normed := self._of_sum(hidden_states)) is not None:
                return normed
            hidden_states = hidden_states.total
        if not args and is_used(self.kernel, hidden_states.device):
            form = self._once(_forms, norm_form)
            if form is not None and takes_rows(hidden_states, self.weight):
                return norm(hidden_states, self.weight, self.epsilon, *form)
        elif not args and self._is_torchs(hidden_states):
            return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon)
        answer: torch.Tensor = super().forward(hidden_states, *args)
        return answer

    def _of_sum(self, pending: PendingSum) -> torch.Tensor | None:
        """The norm of it, in the launch that adds it up; None where no kernel does both."""
        form = self._once(_forms, norm_form) if is_used(self.kernel, self.weight.device) else None
        if form is None or not takes_sum(pending.terms, self.weight):
            return None
        normed, total = norm_of_sum(pending.terms, self.weight, self.epsilon, *form)
        pending.settle(total)
        return normed

    def _is_torchs(self, given: torch.Tensor) -> bool:
        """Whether torch's own function, one call from Python, gives the same bits."""
        if not given.is_cpu or given.dtype is not torch.float32 or self.weight.dtype is not torch.float32:
            return False
        same = self._once(_are_torchs, is_torchs_norm)
        return same is True

    def _once(self, known: dict[type[nn.Module], _T], ask: Callable[[Norm, float], _T]) -> _T | None:
        """What asking the stock class says, asked once; None for what is more than a weight and an epsilon.

        A norm of groups, as Qwen3.8's of its streams, is of a class whose other modules norm rows.
        """
        if getattr(self, "bias", None) is not None or getattr(self, "group_size", None) or not self.epsilon:
            return None
        if self.stock_class not in known:
            known[self.stock_class] = ask(self._stock, self.epsilon)
        return known[self.stock_class]

    def _stock(self, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
        answer: torch.Tensor = self.stock_copy(_parameters=parameters).forward(given)
        return answer
