"""A byte-level vocabulary (`tokenizer.ggml.model` gpt2) as a backend of the tokenizers library."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from .file_vocabulary import FileVocabulary
from .text_splits import TextSplit

__all__ = ["byte_level_backend", "known_merges"]


def known_merges(vocabulary: FileVocabulary) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ids by text, and the merges of tokens that make a token."""
    ids = {text: number for number, text in enumerate(vocabulary.tokens)}
    return ids, [(a, b) for a, b in vocabulary.merges if a in ids and b in ids and a + b in ids]


def byte_level_backend(vocabulary: FileVocabulary, split: TextSplit) -> Tokenizer:
    """Return a backend that cuts texts by `split` and merges bytes; special tokens are still to be added.

    Merges of what the vocabulary does not have are left out.
    """
    ids, merges = known_merges(vocabulary)
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=split.ignore_merges))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
