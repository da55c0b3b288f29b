"""A vocabulary of merged characters (`tokenizer.ggml.model` gemma4, or a split such as `sarvam-moe`).

Spaces are written U+2581 and words are lines, as in SentencePiece; merging is by a list, as in byte-level vocabularies.
A character that is no token is written by its bytes' tokens, `<0xE2>`.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .byte_level import known_merges
from .file_vocabulary import FileVocabulary
from .text_splits import TextSplit

__all__ = ["character_level_backend"]

_SPACE = "\u2581"


def character_level_backend(vocabulary: FileVocabulary, split: TextSplit) -> Tokenizer:
    """Return a backend that cuts texts by `split` and merges characters; special tokens are still to be added."""
    ids, merges = known_merges(vocabulary)
    backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token=vocabulary.text("unknown")))
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    )
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if vocabulary.model == "gemma4":  # its empty lines are one token whatever the merges say
        lines = [text for text in vocabulary.tokens if len(text) > 1 and not text.strip("\n")]
        backend.add_tokens([AddedToken(text, normalized=False) for text in lines])
    return backend
