"""Norms, rotations and routers' choices as one kernel launch each, where a device runs Triton's.

What they write is allocated before they are launched, as one unit of a step: see `device.step_graph`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence

import torch

from hybrimoe_kt.device.step_graph import opaque
from hybrimoe_kt.errors import ConfigError, summary, unknown_name
from hybrimoe_kt.kernels.row_configs import (
    MOST_CHOSEN,
    MOST_COLUMNS,
    MOST_EXPERTS,
    choose_config,
    logits_config,
    norm_config,
    rotate_config,
)
from hybrimoe_kt.kernels.row_forms import Ranking, Rotation

from .gpu_triton import TritonGpu, target_of

__all__ = [
    "ROW_KERNELS",
    "Ranking",
    "Rotation",
    "check_kernel",
    "choose",
    "choose_into",
    "gates_of",
    "is_used",
    "logits_of",
    "norm",
    "norm_of_sum",
    "rotate",
    "takes_gates",
    "takes_heads",
    "takes_ranking",
    "takes_rows",
    "takes_sum",
]

logger = logging.getLogger(__name__)

ROW_KERNELS = ("auto", "triton", "torch")
_FEW = 8
"""Rows up to which a product is bound by its weights."""
_STEP = 8
"""Values by whose multiples rows begin and end, so that they are read 16 bytes at a time."""


def check_kernel(name: str) -> None:
    """ConfigError for what no operator on rows of floats is computed by."""
    if name not in ROW_KERNELS:
        raise ConfigError(unknown_name("kernel", name, ROW_KERNELS))


def is_used(kernel: str, device: torch.device) -> bool:
    """Whether Triton's kernels compute there under that name: with "auto" on a GPU, not on an emulated one."""
    if kernel == "torch" or (device.type == "cpu" and kernel == "auto"):
        return False
    return _can_launch(device, kernel)


@functools.cache
def _can_launch(device: torch.device, kernel: str) -> bool:
    """Whether they run on a device, by trying each; a warning, given once, says why not."""
    reason = TritonGpu.unusable(device)
    if reason is not None:
        if kernel == "triton":
            logger.warning("norms, rotations and routers stay torch's on %s: %s", device, reason)
        return False
    try:
        row = torch.ones(1, 32, device=device)
        norm(row, row[0], 1e-6, offset=0.0, rounds_first=True)
        norm_of_sum((row, row, row), row[0], 1e-6, offset=0.0, rounds_first=True)
        rotate(row.view(1, 1, 1, 32), row.view(1, 1, 1, 32), row[:, :16], row[:, :16], Rotation())
        choose(logits_of(row, row.view(2, 16).repeat(1, 2)), Ranking(2), None)[0].cpu()
    except Exception as error:  # whatever a compiler or driver may raise
        logger.warning(
            "norms, rotations and routers stay torch's on %s, as kernels cannot be built: %s", device, summary(error)
        )
        return False
    return True


def takes_rows(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `norm` does these: of one dtype, rows at an even distance, neither too wide nor odd."""
    width = x.shape[-1]
    if x.dtype != weight.dtype or width > MOST_COLUMNS or width % _STEP or not x.numel():
        return False
    return _row_stride(x) % _STEP == 0


def _row_stride(x: torch.Tensor) -> int:
    """The distance of rows `[..., W]` that lie at an even one; 1 where they do not."""
    if x.stride(-1) != 1:
        return 1
    try:
        return x.view(-1, x.shape[-1]).stride(0)
    except RuntimeError:
        return 1


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, rounds_first: bool) -> torch.Tensor:
    """Norm of `x [..., W]` over its last dimension; see `kernels.rms_norm`."""
    from hybrimoe_kt.kernels.rms_norm import rms_norm

    rows, out = x.view(-1, x.shape[-1]), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = norm_config(target_of(x.device), rows.shape[1])
    written = out.view(rows.shape)
    _launch(x, lambda: rms_norm(rows, weight, epsilon, written, config, offset=offset, rounds_first=rounds_first))
    return out


def takes_sum(terms: Sequence[torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether `norm_of_sum` does these, which have one shape and dtype."""
    return takes_rows(terms[0], weight) and all(term.is_contiguous() for term in terms)


def norm_of_sum(
    terms: Sequence[torch.Tensor], weight: torch.Tensor, epsilon: float, offset: float, rounds_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of the sum of two or three `[..., W]`, the last two added first, and that sum."""
    from hybrimoe_kt.kernels.rms_norm import rms_norm

    first, second, *third = (term.view(-1, term.shape[-1]) for term in terms)
    out, total = torch.empty_like(first), torch.empty_like(first)
    config, more = norm_config(target_of(first.device), first.shape[1]), third[0] if third else None
    form = {"offset": offset, "rounds_first": rounds_first}
    _launch(
        first,
        lambda: rms_norm(first, weight, epsilon, out, config, residual=second, more=more, total=total, **form),
    )
    return out.view(terms[0].shape), total.view(terms[0].shape)


def takes_heads(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether `rotate` does heads `[1, heads, T, W]`, rows in one piece, by angles `[1, T, P]`."""
    if query.dim() != 4 or not len(query) == len(key) == len(cos) == 1 or query.dtype != key.dtype:
        return False
    width = query.shape[-1]
    if key.shape[-1] != width or 2 * cos.shape[-1] > width or query.stride(-1) != 1 or key.stride(-1) != 1:
        return False
    steps = (*query.stride()[1:3], *key.stride()[1:3], width)
    return not any(int(step) % _STEP for step in steps)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: Rotation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn `query` and `key [1, heads, T, W]` by angles `[1, T, P]`, or such `[T, P]`; see `kernels.rotate_heads`."""
    from hybrimoe_kt.kernels.rotate_heads import rotate_heads

    cos, sin = cos.flatten(0, -2), sin.flatten(0, -2)
    query_out, key_out = (torch.empty(heads.shape, dtype=heads.dtype, device=heads.device) for heads in (query, key))
    given, config = (query[0], key[0], cos, sin, query_out[0], key_out[0]), rotate_config(target_of(query.device))
    _launch(query, lambda: rotate_heads(*given, rotation, config))
    return query_out, key_out


def logits_of(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`[T, E]` float32 for `rows [T, W]` and `weight [E, W]`; few rows widen neither, see `kernels.router_logits`."""
    if len(rows) > _FEW or rows.shape[1] % _STEP or not (rows.is_contiguous() and weight.is_contiguous()):
        return torch.nn.functional.linear(rows.float(), weight.float())
    from hybrimoe_kt.kernels.router_logits import router_logits

    out = torch.empty(len(rows), len(weight), dtype=torch.float32, device=rows.device)
    config = logits_config(target_of(rows.device))
    _launch(rows, lambda: router_logits(rows, weight, out, config))
    return out


def takes_gates(rows: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether `gates_of` does these."""
    is_plain = rows.is_contiguous() and weights.is_contiguous()
    return len(rows) <= _FEW and rows.shape[1] % _STEP == 0 and is_plain


def gates_of(rows: torch.Tensor, weights: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """`[T, N, E]` float32 for `rows [T, W]` times `factors [N, W]` and `weights [N, E, W]`; see `router_logits`."""
    from hybrimoe_kt.kernels.router_logits import router_logits

    out = torch.empty(len(rows), *weights.shape[:2], dtype=torch.float32, device=rows.device)
    given = rows, weights.flatten(0, 1), out.flatten(1), logits_config(target_of(rows.device)), factors
    _launch(rows, lambda: router_logits(*given))
    return out


def takes_ranking(ranking: Ranking, num_experts: int) -> bool:
    """Whether `choose` does it for so many experts."""
    return bool(num_experts <= MOST_EXPERTS and ranking.top_k <= MOST_CHOSEN)


def choose(
    logits: torch.Tensor, ranking: Ranking, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights float32 and ids int64 `[T, K]`, softmax float32 `[T, E]` of `logits`; see `kernels.choose_experts`."""
    (tokens, num_experts), device = logits.shape, logits.device
    weights = torch.empty(tokens, ranking.top_k, device=device, dtype=torch.float32)
    ids = torch.empty(tokens, ranking.top_k, device=device, dtype=torch.int64)
    probabilities = torch.empty(tokens, num_experts, device=device, dtype=torch.float32)
    choose_into(logits, ranking, bias, weights, ids, probabilities)
    return weights, ids, probabilities


def choose_into(
    logits: torch.Tensor,
    ranking: Ranking,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    ids: torch.Tensor,
    probabilities: torch.Tensor,
) -> None:
    """The same, written where it belongs; without `weights` only ids and the softmax."""
    from hybrimoe_kt.kernels.choose_experts import choose_experts

    config = choose_config(target_of(logits.device))
    _launch(logits, lambda: choose_experts(logits, ranking, bias, weights, ids, probabilities, config))


def _launch(given: torch.Tensor, work: Callable[[], None]) -> None:
    def on_device() -> None:
        with torch.cuda.device(given.device) if given.is_cuda else contextlib.nullcontext():
            work()

    opaque(on_device)
