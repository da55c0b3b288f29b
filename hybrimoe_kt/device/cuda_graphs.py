"""CUDA and HIP graphs of torch's, one for each piece of a step."""

from __future__ import annotations

import torch

from .step_graph import CaptureError, StepGraph

__all__ = ["CudaCapture"]


class CudaCapture:
    """See `step_graph.StepCapture`. All of its pieces share one pool of memory."""

    host_sees_writes = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        assert self._graph is None, "one piece at a time"
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except RuntimeError as error:
            raise CaptureError(f"{self._device} does not begin to capture: {error}") from error
        self._graph = graph

    def end(self) -> StepGraph:
        graph, self._graph = self._graph, None
        assert graph is not None, "nothing was begun"
        try:
            graph.capture_end()
        except RuntimeError as error:
            raise CaptureError(f"{self._device} cannot replay this step: {error}") from error
        graph.replay()
        return graph

    def abort(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            try:
                graph.capture_end()
            except RuntimeError:
                graph.reset()
