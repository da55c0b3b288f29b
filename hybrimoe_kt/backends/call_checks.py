"""Whether a step is one that CPU kernels compute right.

They trust their caller: wrong dtypes, lengths or ids crash the process or return wrong numbers.
"""

from __future__ import annotations

import math

import torch

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import KernelError

__all__ = ["check_call"]


def check_call(experts: LayerExperts, max_tokens: int, routed: Routed) -> None:
    """Raise KernelError for a call that the kernel would crash on or answer wrongly."""
    hidden, ids, weights = routed[:3]
    num_tokens = hidden.shape[0]
    if not 1 <= num_tokens <= max_tokens:
        raise KernelError(f"{num_tokens} tokens in one call, this backend was built for 1 to {max_tokens}")
    if hidden.dtype != torch.float32 or hidden.shape[1] != experts.hidden:
        raise KernelError(f"hidden is {hidden.dtype} {list(hidden.shape)}, wanted float32 [tokens, {experts.hidden}]")
    if ids.dtype != torch.int64 or weights.dtype != torch.float32 or ids.shape != weights.shape:
        raise KernelError(f"expert ids are {ids.dtype} and weights {weights.dtype}; wanted int64 and float32")
    if ids.shape[0] != num_tokens or not 1 <= ids.shape[1] <= experts.top_k:
        raise KernelError(f"routing is {list(ids.shape)}, wanted [{num_tokens}, at most {experts.top_k}]")
    # One reduction each: NaN and infinity survive a sum (unlike in the kernel, which hides them).
    if not math.isfinite(hidden.sum().item()) and not hidden.isfinite().all():
        raise KernelError(
            f"hidden states entering the experts of layer {experts.layer} are not finite (NaN or infinity)"
        )
    if not math.isfinite(weights.sum().item()) and not weights.isfinite().all():
        raise KernelError(f"routing weights of layer {experts.layer} are not finite (NaN or infinity)")
    _check_ids(experts, ids)


def _check_ids(experts: LayerExperts, ids: torch.Tensor) -> None:
    if ids.shape[0] == 1:
        used = [index for index in ids[0].tolist() if index >= 0]
        top, duplicated = max(used, default=0), len(set(used)) != len(used)
    else:
        ordered = ids.sort(dim=1).values
        duplicated = bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())
        top = int(ordered[:, -1].max())
    if int(ids.min()) < -1:
        raise KernelError(f"expert {int(ids.min())} routed in layer {experts.layer}; -1 is the one negative id")
    if top >= experts.num_experts:
        raise KernelError(f"expert {top} routed in layer {experts.layer}, which has {experts.num_experts}")
    if duplicated:
        raise KernelError(f"one token names the same expert twice in layer {experts.layer}")
