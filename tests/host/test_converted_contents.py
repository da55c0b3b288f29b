"""What converted files say beside their weights, of families without a generator: as llama.cpp reads it, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader

from hybrimoe_kt.errors import ModelError
from tests.support.rewritten import rewritten

from . import llama_cpp_converter
from .families import FAMILIES, random_model, save_checkpoint
from .test_converted import LLAMA_CPP_DIFFERS
from .test_file_contents import OTHER, SHAPES, USED, Keys, assert_as_llama_cpp

APART = {"mellum": "beyond a window llama.cpp is 0.06 away, with a base of its own in layers with windows"}
BACKENDS = {"deepseek4": "ggml"}
"""Where experts are quantised, what multiplies them as llama.cpp does: with 8 bits of what enters."""
UNGENERATED = [
    name
    for name in FAMILIES
    if name not in {*SHAPES, *LLAMA_CPP_DIFFERS, *APART, "mixtral", "kimi-k2", "qwen35moe-fused"}
]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNGENERATED)
def test_every_key(tmp_path: Path, name: str) -> None:
    root = llama_cpp_converter.find()
    if root is None:
        pytest.skip(llama_cpp_converter.MISSING)
    llama_cpp_converter.convert([save_checkpoint(name, random_model(name), tmp_path)], root)
    file = tmp_path / "model.gguf"
    prefix = GGUFReader(str(file)).fields["general.architecture"].contents()
    cases: dict[str, Keys] = {case: keys for case, keys in (USED | OTHER).items() if "gating" not in case}
    verdicts = []
    for case, keys in cases.items():
        changed = rewritten(file, tmp_path / "changed.gguf", {f"{prefix}.{key}": value for key, value in keys.items()})
        try:
            verdicts.append(assert_as_llama_cpp(changed, cpu_backend=BACKENDS.get(name, "torch_reference")))
        except (AssertionError, ModelError) as error:
            raise AssertionError(f"{name}, {case}: {error}") from error
    assert "equal" in verdicts and "refused" in verdicts
