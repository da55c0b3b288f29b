"""vLLM's schedulers, with one thing more: requests of a step that failed end with an error, and the rest goes on.

A failed step's logits are NaN (`EngineExperts.finish`), whichever rank it failed on, and vLLM counts those by request.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

__all__ = ["AsyncHybridScheduler", "HybridScheduler"]

logger = init_logger("vllm.hybrimoe")


class _EndsFailed:
    requests: Any
    kv_cache_manager: Any
    finish_requests: Any

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        counted = model_runner_output.num_nans_in_logits or {}
        failed = {name for name, count in counted.items() if count and name in self.requests}
        if not failed:
            return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        logger.error("a step failed, and with it %d requests: %s", len(failed), ", ".join(sorted(failed)))
        for name in failed:
            self._forget_blocks(name)
            place = model_runner_output.req_id_to_index[name]
            if model_runner_output.sampled_token_ids:
                model_runner_output.sampled_token_ids[place] = []  # nobody's
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request in self.finish_requests(failed, RequestStatus.FINISHED_ERROR):
            told = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            told.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def _forget_blocks(self, name: str) -> None:
        """No later request may begin with what a failed step has written."""
        manager = self.kv_cache_manager
        for blocks in manager.get_block_ids(name):
            manager.evict_blocks(set(blocks))


class HybridScheduler(_EndsFailed, Scheduler):  # type: ignore[misc]
    """For engines that plan a step when the last has ended."""


class AsyncHybridScheduler(_EndsFailed, AsyncScheduler):  # type: ignore[misc]
    """For engines that plan the next step while one is under way: a token of a failed step may be one step old."""
