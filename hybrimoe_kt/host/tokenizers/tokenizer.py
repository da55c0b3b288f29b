"""The tokenizer: from a model directory when there is one, else rebuilt from the GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from hybrimoe_kt.errors import ModelError, first_line
from hybrimoe_kt.host.hf.architectures import architecture_of, every_architecture
from hybrimoe_kt.weights.checkpoint import Checkpoint
from hybrimoe_kt.weights.gguf_file import GgufFile

from .byte_level import byte_level_backend
from .character_level import character_level_backend
from .file_vocabulary import FileVocabulary, TokenType
from .sentencepiece import sentencepiece_backend, split_into_pieces
from .text_splits import TEXT_SPLITS, TextSplit

__all__ = ["load_tokenizer"]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_tokenizer(file: GgufFile | Checkpoint, model_path: str | Path | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer; ModelError when neither source has one. Warns where a rebuilt one may split differently."""
    if model_path is not None and any((Path(model_path) / name).is_file() for name in _TOKENIZER_FILES):
        directory = Path(model_path)
        return _or_model_error(f"{model_path}: its tokenizer cannot be used", lambda: _from_directory(directory))
    if not isinstance(file, GgufFile) or "tokenizer.ggml.tokens" not in file.metadata:
        raise ModelError(f"{file.path}: holds no tokenizer; give --model_path a directory that has one")
    return _or_model_error(f"{file.path}: its tokenizer cannot be rebuilt", lambda: _from_gguf(file))


def _from_directory(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _from_gguf(file: GgufFile) -> PreTrainedTokenizerBase:
    vocabulary = FileVocabulary.of(file.metadata)
    if vocabulary.model == "llama":
        backend, adds_bos = sentencepiece_backend(vocabulary), True
    else:
        split = _text_split(file, vocabulary)
        build = byte_level_backend if split.merges_bytes else character_level_backend
        backend, adds_bos = build(vocabulary, split), split.adds_bos
    typed = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    hidden = (TokenType.CONTROL, TokenType.UNKNOWN)
    backend.add_special_tokens([AddedToken(text, normalized=False) for text, kind in typed if kind in hidden])
    backend.add_tokens([AddedToken(text, normalized=False) for text, kind in typed if kind == TokenType.USER_DEFINED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=vocabulary.text("bos"),
        eos_token=vocabulary.text("eos"),
        unk_token=vocabulary.text("unknown"),
        pad_token=vocabulary.text("padding"),
        add_bos_token=adds_bos if vocabulary.adds_bos is None else vocabulary.adds_bos,
        add_eos_token=vocabulary.adds_eos,
        chat_template=vocabulary.chat_template,
        clean_up_tokenization_spaces=False,
    )
    if vocabulary.model == "llama":
        split_into_pieces(tokenizer.backend_tokenizer, vocabulary)
    return tokenizer


def _text_split(file: GgufFile, vocabulary: FileVocabulary) -> TextSplit:
    """What the file names; a warning, and what its family's files name, for a file that names none or one unknown."""
    known = {name: TextSplit(patterns) for family in every_architecture() for name, patterns in family.splits.items()}
    known |= TEXT_SPLITS
    if vocabulary.split in known:
        return known[vocabulary.split]
    names = [name for name in architecture_of(file).pre_tokenizers if name in known]
    by_size = _BY_SIZE.get(len(vocabulary.tokens), "")
    guess = by_size if by_size in names else next(iter(names), "default")
    logger.warning(
        "%s: %s; guessed: %s, as in other files of its architecture. "
        "Give --model_path a directory with the model's own tokenizer for exact tokens",
        file.path.name,
        "the file does not say how its tokenizer splits text" if vocabulary.split is None
        else f"its tokenizer splits text in a way that is not known here, {vocabulary.split!r}",
        guess,
    )  # fmt: skip
    return known[guess]


_BY_SIZE = {102400: "deepseek-llm", 129280: "deepseek-v3", 163840: "kimi-k2", 128256: "llama-bpe", 131072: "tekken"}
"""Vocabularies of released models that share an architecture: number of tokens -> how they split texts."""


def _or_model_error(failure: str, load: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return load()
    except Exception as error:  # the tokenizers library raises bare Exceptions for a broken vocabulary
        raise ModelError(f"{failure}: {first_line(error)}") from None
    finally:
        transformers_logging.set_verbosity(level)
