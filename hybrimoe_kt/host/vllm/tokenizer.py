"""Tokenizers that no file can hold, rebuilt from the GGUF file itself in each of vLLM's processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm.tokenizers.registry import TokenizerRegistry

from hybrimoe_kt.host.engines.model_folder import GGUF_NOTE
from hybrimoe_kt.host.tokenizers.tokenizer import load_tokenizer
from hybrimoe_kt.weights.gguf_file import GgufFile

from .names import TOKENIZER_MODE

__all__ = ["FileTokenizer", "add_tokenizer"]


def add_tokenizer() -> None:
    """Make `--tokenizer-mode hybrimoe` known."""
    if TOKENIZER_MODE not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(TOKENIZER_MODE, __name__, FileTokenizer.__name__)


class FileTokenizer:
    """What vLLM asks for a tokenizer."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **__: Any) -> Any:
        """The tokenizer of the file that `folder` was made of."""
        note = json.loads((Path(folder) / GGUF_NOTE).read_text(encoding="utf-8"))
        return load_tokenizer(GgufFile(note["gguf"]), None)
