"""What a failed step takes with it, by vLLM's own schedulers without an engine around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from hybrimoe_kt.host.vllm.scheduler import AsyncHybridScheduler, HybridScheduler
from hybrimoe_kt.models import tiny_model

from .offline import ENGINE

BLOCK, PROMPT = 16, 80


@pytest.fixture(scope="module")
def config() -> Any:
    options = {"hybrimoe": {"accelerator": "none"}}
    found = EngineArgs(
        str(tiny_model()), additional_config=options, **(ENGINE | {"enable_prefix_caching": True})
    ).create_engine_config()
    found.cache_config.num_gpu_blocks, found.cache_config.block_size = 64, BLOCK
    init_none_hash(sha256)
    return found


def scheduler(config: Any, cls: Any) -> Any:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32)
    kept = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return cls(
        vllm_config=config, kv_cache_config=kept, structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK, log_stats=False,
    )  # fmt: skip


def request(name: str, first: int = 4, **sampling: Any) -> Request:
    """A prompt of 80 tokens, alike where `first` is."""
    wanted = SamplingParams(max_tokens=8, ignore_eos=True, **sampling)
    hasher = get_request_block_hasher(BLOCK, sha256)
    prompt = list(range(first, first + PROMPT))
    return Request(name, prompt, wanted, None, block_hasher=hasher)


def answer(step: Any, *, failed: bool, **given: Any) -> ModelRunnerOutput:
    names = list(step.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: place for place, name in enumerate(names)},
        sampled_token_ids=[[7] for _ in names],
        prompt_logprobs_dict=given.get("prompts", {}),
        num_nans_in_logits=dict.fromkeys(names, 5 if failed else 0),
    )


def told(outputs: Any) -> dict[str, tuple[list[int], Any]]:
    return {each.request_id: (each.new_token_ids, each.finish_reason) for o in outputs.values() for each in o.outputs}


def step_of(ours: Any, *requests: Request) -> Any:
    for each in requests:
        ours.add_request(each)
    return ours.schedule()


ERROR = ([], FinishReason.ERROR)


@pytest.mark.parametrize("cls", [HybridScheduler, AsyncHybridScheduler])
def test_all_of_a_failed_step_and_nothing_else(config: Any, cls: Any) -> None:
    ours = scheduler(config, cls)
    first = step_of(ours, request("A"), request("B", 200))
    assert told(ours.update_from_output(first, answer(first, failed=True))) == {"A": ERROR, "B": ERROR}
    later = step_of(ours, request("C"))
    assert later.num_scheduled_tokens == {"C": PROMPT}, "the prefix cache has nothing of it"
    assert told(ours.update_from_output(later, answer(later, failed=False))) == {"C": ([7], None)}


def test_requests_that_began_with_what_it_wrote_are_lost_too(config: Any) -> None:
    """The next step has been planned by then, on blocks of the one that failed; a stranger's request goes on."""
    ours = scheduler(config, AsyncHybridScheduler)
    first = step_of(ours, request("A"))
    second = step_of(ours, request("C"), request("S", 300))
    assert second.num_scheduled_tokens["C"] < PROMPT
    assert told(ours.update_from_output(first, answer(first, failed=True))) == {"A": ERROR, "C": ERROR}
    assert told(ours.update_from_output(second, answer(second, failed=False))) == {"S": ([7], None)}


def test_nothing_is_kept_of_a_request_that_was_aborted_meanwhile(config: Any) -> None:
    ours = scheduler(config, HybridScheduler)
    first = step_of(ours, request("A"))
    ours.finish_requests("A", RequestStatus.FINISHED_ABORTED)
    ours.update_from_output(first, answer(first, failed=True))
    assert step_of(ours, request("D")).num_scheduled_tokens == {"D": PROMPT}


def test_a_prompts_logprobs_are_nobodys(config: Any) -> None:
    ours = scheduler(config, HybridScheduler)
    first = step_of(ours, request("P", prompt_logprobs=1))
    zeros = torch.zeros(PROMPT - 1, 2)
    prompts = {"P": LogprobsTensors(zeros.long(), zeros, zeros[:, 0].long())}
    assert told(ours.update_from_output(first, answer(first, failed=True, prompts=prompts))) == {"P": ERROR}
