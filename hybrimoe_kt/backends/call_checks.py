"""Whether a step is one that CPU kernels compute right.

They trust their caller: wrong dtypes, lengths or ids crash the process or return wrong numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import chain
from typing import NamedTuple

import torch

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import LayerExperts
from hybrimoe_kt.errors import KernelError

__all__ = ["INTEGERS", "CheckedRows", "check_call", "check_finite", "checked_rows"]

INTEGERS = torch.int64, torch.int32
"""What ids may be, where a backend takes both."""


class CheckedRows(NamedTuple):
    """A step's pairs of a token and an expert, token by token."""

    tokens: int
    per_token: int
    chosen: list[int]
    shares: list[float]


def checked_rows(experts: LayerExperts, max_tokens: int, routed: Routed) -> CheckedRows | None:
    """Experts and weights of a call that is right, but for its hidden states, which are not looked at.

    None for a call that leaves pairs to others, and for every other: `check_call` says what is wrong with it, if
    anything is. Ids are either of `INTEGERS`.
    """
    hidden, ids, weights = routed[:3]
    if hidden.dtype is not torch.float32 or weights.dtype is not torch.float32 or ids.dtype not in INTEGERS:
        return None
    shape = ids.shape
    if shape != weights.shape or len(shape) != 2 or hidden.shape != (shape[0], experts.hidden):
        return None
    tokens, per_token = shape
    if not 1 <= tokens <= max_tokens or not 1 <= per_token <= experts.top_k:
        return None
    rows: list[list[int]] = ids.tolist()
    given: list[list[float]] = weights.tolist()
    chosen, shares = rows[0], given[0]
    if tokens > 1:
        chosen, shares = list(chain.from_iterable(rows)), list(chain.from_iterable(given))
    if min(chosen) < 0 or max(chosen) >= experts.num_experts or not math.isfinite(sum(shares)):
        return None
    for row in rows:
        if len(set(row)) != per_token:
            return None
    return CheckedRows(tokens, per_token, chosen, shares)


def check_call(
    experts: LayerExperts,
    max_tokens: int,
    routed: Routed,
    id_types: Collection[torch.dtype] = (torch.int64,),
    *,
    is_finite: bool = False,
) -> None:
    """Raise KernelError for a call that the kernel would crash on or answer wrongly.

    `is_finite`: the hidden states are known to be, and are not looked at.
    """
    hidden, ids, weights = routed[:3]
    num_tokens = hidden.shape[0]
    if not 1 <= num_tokens <= max_tokens:
        raise KernelError(f"{num_tokens} tokens in one call, this backend was built for 1 to {max_tokens}")
    if hidden.dtype != torch.float32 or hidden.shape[1] != experts.hidden:
        raise KernelError(f"hidden is {hidden.dtype} {list(hidden.shape)}, wanted float32 [tokens, {experts.hidden}]")
    if ids.dtype not in id_types or weights.dtype != torch.float32 or ids.shape != weights.shape:
        wanted = " or ".join(str(kind).removeprefix("torch.") for kind in id_types)
        raise KernelError(f"expert ids are {ids.dtype} and weights {weights.dtype}; wanted {wanted} and float32")
    if ids.shape[0] != num_tokens or not 1 <= ids.shape[1] <= experts.top_k:
        raise KernelError(f"routing is {list(ids.shape)}, wanted [{num_tokens}, at most {experts.top_k}]")
    if not is_finite:
        check_finite(experts.layer, hidden)
    if not math.isfinite(weights.sum().item()) and not weights.isfinite().all():
        raise KernelError(f"routing weights of layer {experts.layer} are not finite (NaN or infinity)")
    _check_ids(experts, ids)


def check_finite(layer: int, hidden: torch.Tensor) -> None:
    """Raise KernelError for hidden states `[num_tokens, hidden]` that kernels would hide NaN or infinity of."""
    if not math.isfinite(hidden.sum().item()) and not hidden.isfinite().all():  # they survive a sum
        raise KernelError(f"hidden states entering the experts of layer {layer} are not finite (NaN or infinity)")


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
