"""Tiny models of vLLM's tests, made once: safetensors as published, and the same as GGUF."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LLAMA_CPP = ROOT / ".cache/llama.cpp"

Make = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that gives a family's checkpoint and its GGUF file; `kind` is the converter's word."""
    from tests.host.families import FAMILIES, random_model, save_checkpoint

    from .shared_families import ADAPTED, PUBLISHED

    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(name: str, kind: str = "ALL_F32") -> tuple[Path, Path]:
        if not LLAMA_CPP.is_dir():
            pytest.skip("llama.cpp's converter is not here")
        if (name, kind) not in made:
            folder = tmp_path_factory.mktemp(name)
            before = FAMILIES[name]
            FAMILIES[name] = ADAPTED.get(name, lambda family: family)(before)
            try:
                save_checkpoint(name, random_model(name), folder)
            finally:
                FAMILIES[name] = before
            subprocess.run(
                [sys.executable, ROOT / "tests/host/convert_models.py", LLAMA_CPP, kind, folder],
                check=True, capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip
            file = folder.with_suffix(".gguf")
            (folder / "model.gguf").rename(file)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | PUBLISHED.get(name, {})))
            made[name, kind] = folder, file
        return made[name, kind]

    return make
