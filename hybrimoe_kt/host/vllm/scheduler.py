"""vLLM's schedulers, with one thing more: requests of a step that failed end with an error, and the rest goes on.

A failed step's logits are NaN, whichever rank it failed on, and vLLM counts those by request. Other requests are lost
with it where they have begun with what it wrote: vLLM lets a prompt be found as soon as it is scheduled, and where
several steps are under way that is before it is known to have failed.
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
    running: Any
    kv_cache_manager: Any
    finish_requests: Any

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        counted = model_runner_output.num_nans_in_logits or {}
        named = {name for name, count in counted.items() if count}
        if not named:
            return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        failed = named & self.requests.keys()
        lost = failed | self._began_with_it(scheduler_output, named)
        logger.error("a step failed, and with it %d requests: %s", len(lost), ", ".join(sorted(lost)))
        pool = self.kv_cache_manager.block_pool
        self.kv_cache_manager.evict_blocks(set(range(len(pool.blocks))))  # whoever comes begins with none of it
        for name in failed:
            _take_answer(model_runner_output, name)
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for request in self.finish_requests(lost, RequestStatus.FINISHED_ERROR):
            told = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            told.outputs = [each for each in told.outputs if each.request_id != request.request_id]
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

    def _began_with_it(self, scheduler_output: Any, named: set[str]) -> set[str]:
        """Other requests that hold blocks which the failed step has written.

        Of a request that is gone since, aborted or preempted, nobody knows the blocks any more: then all that run.
        """
        others = {request.request_id for request in self.running} - named
        if not others:
            return others
        cached = scheduler_output.scheduled_cached_reqs
        begun = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        begun |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        written: set[int] = set()
        for name in named:
            blocks = self._blocks(name, begun.get(name, 0))
            if not blocks:
                return others
            written |= blocks
        return {name for name in others if not written.isdisjoint(self._blocks(name, 0))}

    def _blocks(self, name: str, from_token: int) -> set[int]:
        """The blocks of a request from one that holds `from_token` on."""
        manager = self.kv_cache_manager
        if name not in self.requests:
            return set()
        groups = manager.kv_cache_config.kv_cache_groups
        found: set[int] = set()
        for group, blocks in zip(groups, manager.get_block_ids(name), strict=True):
            found.update(blocks[from_token // group.kv_cache_spec.block_size :])
        return found - {manager.block_pool.null_block.block_id}


def _take_answer(output: Any, name: str) -> None:
    """What a failed step has sampled for a request is nobody's."""
    if output.sampled_token_ids:
        output.sampled_token_ids[output.req_id_to_index[name]] = []
    for prompts in (output.prompt_logprobs_dict, output.prompt_token_id_logprobs_dict):
        if prompts:
            prompts.pop(name, None)


class HybridScheduler(_EndsFailed, Scheduler):  # type: ignore[misc]
    """For engines that plan a step when the last has ended."""


class AsyncHybridScheduler(_EndsFailed, AsyncScheduler):  # type: ignore[misc]
    """For engines that plan the next step while one is under way."""
