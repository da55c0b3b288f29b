"""What SGLang knows of a step, and the end of requests whose step has failed.

A failed step's logits are NaN (`EngineExperts.finish`) on every rank, whichever it failed on. SGLang makes tokens of
them that mean nothing; they are counted before it does, and their requests end with an error when it reads its tokens.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from hybrimoe_kt.host.engines.experts import EngineStep

__all__ = ["current_step", "watch_steps"]

logger = logging.getLogger(__name__)

_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
_LOST = "hybrimoe_lost"
_MESSAGE = "a step with this request failed; the server's log says why"

_batch: Any = None
"""The batch under way, of the one model that a process runs."""


def watch_steps() -> None:
    """Begin to listen, in a process that has loaded a model of ours; may be called again."""
    hooks = {
        f"{_RUNNER}._forward_raw": (_forward, HookType.AROUND),
        f"{_RUNNER}.sample": (_count_lost, HookType.BEFORE),
        f"{_RESULTS}.process_batch_result_prefill": (_end_lost, HookType.BEFORE),
        f"{_RESULTS}.process_batch_result_decode": (_end_lost, HookType.BEFORE),
    }
    for target, (hook, kind) in hooks.items():
        if target not in HookRegistry._patched:
            HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()


def current_step() -> EngineStep:
    """The step under way: what runs without a batch of requests warms up or is captured."""
    if _batch is None:
        return EngineStep(is_trial=True)
    is_decode = _batch.forward_mode.is_decode()
    return EngineStep(_batch.global_num_token_non_padded_cpu, "decode" if is_decode else "prefill")


def _forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    global _batch
    _batch = forward_batch
    try:
        return original(runner, forward_batch, *args, **kwargs)
    finally:
        _batch = None


def _count_lost(runner: Any, logits_output: Any, forward_batch: Any) -> None:
    logits = logits_output.next_token_logits
    setattr(logits_output, _LOST, None if logits is None else logits.isnan().any(dim=-1))


def _end_lost(processor: Any, batch: Any, result: Any) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    lost = getattr(getattr(result, "logits_output", None), _LOST, None)
    if lost is None or not bool(lost.any()):
        return
    for request, is_lost in zip(batch.reqs, lost.tolist(), strict=False):
        if is_lost and not request.finished():
            logger.error("a step failed, and with it request %s", request.rid)
            request.skip_radix_cache_insert = True
            request.to_finish = FINISH_ABORT(_MESSAGE, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
