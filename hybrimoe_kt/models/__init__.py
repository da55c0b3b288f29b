"""The embedded models, routing traces of the larger one, and where they come from (README.md beside this file)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

__all__ = ["embedded_model", "recorded_traces", "tiny_model"]


def embedded_model() -> Path:
    """The GGUF file that runs when no model is named."""
    return _file("small-talk-q4_k.gguf")


def tiny_model() -> Path:
    """A GGUF file of the same architecture and tokenizer, trained too, small enough for quick tests."""
    return _file("small-talk-tiny-q4_k.gguf")


def recorded_traces() -> dict[str, Path]:
    """Name of each kind of held-out text -> routing of the embedded model on it, one token at a time."""
    folder = _file("traces")
    return {file.stem: file for file in sorted(folder.glob("*.npz"))}


def _file(name: str) -> Path:
    return Path(str(resources.files("hybrimoe_kt.models") / name))
