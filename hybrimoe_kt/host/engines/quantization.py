"""What vLLM and SGLang, whose classes have one ancestor, want to know of a quantisation method that has no files."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["METHOD", "WithoutFiles"]

METHOD = "hybrimoe"
"""What the method is called: `--quantization hybrimoe`."""


class WithoutFiles:
    """Goes in front of an engine's `QuantizationConfig`: nothing is read of a model's own configuration."""

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.half, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of the oldest card that Triton compiles for."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        return cls()
