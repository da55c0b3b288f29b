"""A CPU backend that fails once whenever somebody writes a file: "tests.engines.vllm.faulty:FaultyBackend"."""

from __future__ import annotations

import os
from pathlib import Path

from hybrimoe_kt.backends.torch_reference import TorchReferenceCpu
from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.errors import KernelError

__all__ = ["FAULT_FILE", "FaultyBackend"]

FAULT_FILE = "HYBRIMOE_FAULT_FILE"


class FaultyBackend(TorchReferenceCpu):
    """The reference, but for that. Of several ranks one fails: whoever takes the file away."""

    name = "faulty"

    def submit(self, layer: int, routed: Routed) -> None:
        try:
            Path(os.environ[FAULT_FILE]).unlink()
        except FileNotFoundError:
            super().submit(layer, routed)
        else:
            raise KernelError("injected")
