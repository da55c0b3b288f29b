"""Steps that no accelerator has a part in: all of it is the CPU's, so that nothing is planned."""

from __future__ import annotations

import time

import torch

from hybrimoe_kt.backends.call_checks import check_finite
from hybrimoe_kt.core.coordinator import Coordinator
from hybrimoe_kt.core.types import is_decode
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.executor import Executor
from hybrimoe_kt.device.readback import on_host

from .job import Job
from .routing import loads_of
from .seconds import Seconds

__all__ = ["CpuSteps"]


class CpuSteps:
    """Starts and ends them. Whatever is counted of a planned step is counted of these."""

    def __init__(self, coordinator: Coordinator, executor: Executor, seconds: Seconds) -> None:
        self._coordinator, self._executor, self._seconds = coordinator, executor, seconds

    def begin(self, job: Job, routed: Routed) -> None:
        """Start one chunk; KernelError, with nothing counted, for hidden states that are not finite.

        One that routes to no expert here has its answer at once.
        """
        layer, seconds, now = job.layer, self._seconds, time.perf_counter
        began = now()
        host = on_host(routed if self._executor.cpu.takes_int32 else routed.with_long_ids())
        check_finite(layer, host.hidden)
        num_tokens, loads = len(host.ids), loads_of(host.ids)
        if not loads:  # all of it is other ranks'
            job.answer = torch.zeros_like(routed.hidden)
            return
        read_s = now()
        decodes = is_decode(num_tokens, routed.phase)
        job.predicted_s = self._coordinator.count_on_cpu(layer, loads, num_tokens, is_decode=decodes)
        planned = now()
        self._executor.start_on_cpu(layer, host)
        job.on_cpu = routed
        seconds.read += read_s - began
        seconds.plan += planned - read_s
        seconds.submit_and_gpu += now() - planned

    def finish(self, routed: Routed, predicted_s: float) -> torch.Tensor:
        """Wait for it; `[num_tokens, hidden]` as `routed` has its hidden states, in memory of its own."""
        began = time.perf_counter()
        answer = self._executor.finish_on_cpu(routed, predicted_s)
        self._seconds.wait += time.perf_counter() - began
        return answer
