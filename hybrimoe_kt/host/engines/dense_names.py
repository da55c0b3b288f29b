"""Dense weights under the names that published checkpoints have, which engines' loaders expect.

Transformers renames and joins some of them while it loads; its own table of that is read backwards here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from hybrimoe_kt.host.hf.sources import Source

__all__ = ["dense_weights"]

_EXPERTS = re.compile(r"\.experts\.(?:\d+\.|(?:gate|up|down|gate_up)_proj)")


def dense_weights(source: Source, outline: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """All but routed experts, one by one, on the CPU.

    `outline` is the model without weights, where the file's are under Transformers' names (a GGUF file); else None.
    """
    if outline is None:
        state = source.state({}, dtype, lambda name: torch.device("cpu"))
        return ((name, lazy[...]) for name, lazy in state.items())
    return published(outline, source.state(dense_parameters(outline), dtype, lambda name: torch.device("cpu")))


def dense_parameters(outline: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that a model without weights stores, but for routed experts; tied ones only once."""
    tied = set(getattr(outline, "all_tied_weights_keys", None) or {})
    state = outline.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if name not in tied and not _EXPERTS.search(name)}


def published(outline: Any, state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight of `state`, made when it is asked for, as a checkpoint has it; one may become several.

    `state` maps Transformers' names to what gives a tensor when indexed with `...`.
    """
    for name, lazy in state.items():
        yield from revert_weight_conversion(outline, {name: lazy[...]}).items()
