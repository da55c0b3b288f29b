"""Tokenizers that no file can hold, rebuilt from the GGUF file itself in each of vLLM's processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.hf import get_cached_tokenizer
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
        RENDERER_REGISTRY.register(TOKENIZER_MODE, *RENDERER_REGISTRY.renderers["hf"])


class FileTokenizer(PreTrainedTokenizerFast):
    """One that merges in Python, which cannot be copied: deep copies, one for each of vLLM's threads, are made anew."""

    file: str

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **__: Any) -> Any:
        """The tokenizer of the file that `folder` was made of."""
        note = json.loads((Path(folder) / GGUF_NOTE).read_text(encoding="utf-8"))
        tokenizer = load_tokenizer(GgufFile(note["gguf"]), None)
        tokenizer.__class__ = cls
        tokenizer.file = note["gguf"]
        return get_cached_tokenizer(tokenizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        fresh = copy.copy(self)
        fresh._tokenizer = load_tokenizer(GgufFile(self.file), None).backend_tokenizer
        return fresh
