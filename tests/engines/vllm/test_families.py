"""A GGUF file of every family that vLLM shares with us answers as vLLM's own model does from safetensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-engines")

from tests.host.families import FAMILIES

from .offline import elsewhere, here
from .shared_families import NOT_HERE, SHARED

Make = Callable[..., tuple[Path, Path]]
OPTIONS = {"hybrimoe": {"accelerator": "emulated", "cache_size": "50%", "cpu_backend": "torch_reference"}}
BY_TRANSFORMERS = ("hunyuan-moe", "solar-open")
"""vLLM changes Transformers' classes of these for its own use, so that each engine wants a process of its own."""


def test_every_family_is_spoken_of() -> None:
    assert {*SHARED, *NOT_HERE} == set(FAMILIES)
    assert not set(SHARED) & set(NOT_HERE)


@pytest.mark.parametrize("name", SHARED)
def test_tokens_are_the_stock_models(family: Make, tmp_path: Path, name: str) -> None:
    checkpoint, file = family(name)
    if name in BY_TRANSFORMERS:
        assert elsewhere(file, tmp_path, additional_config=OPTIONS) == elsewhere(checkpoint, tmp_path)
    else:
        assert here(file, count=4, additional_config=OPTIONS) == here(checkpoint, count=4)
