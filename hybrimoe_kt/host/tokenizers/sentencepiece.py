"""A SentencePiece vocabulary (`tokenizer.ggml.model` llama): pieces merged by score, bytes for what has no piece.

The tokenizers library ranks merges by pair, where SentencePiece ranks them by what they make and takes the leftmost of
equals; so the merging is done here, in front of a model of the library's that only looks pieces up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

from tokenizers import NormalizedString, PreTokenizedString, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .file_vocabulary import FileVocabulary

__all__ = ["PieceSplitter", "sentencepiece_backend", "split_into_pieces"]

_SPACE = "\u2581"
_CACHED_WORDS = 2**16
_BLOCK = 512  # characters; slicing a NormalizedString takes time in proportion to its length


def sentencepiece_backend(vocabulary: FileVocabulary) -> Tokenizer:
    """Return a backend that looks up pieces; `split_into_pieces` must be called on the copy that is used."""
    ids = {text: number for number, text in enumerate(vocabulary.tokens)}
    unknown = vocabulary.text("unknown")
    backend = Tokenizer(models.BPE(ids, [], ignore_merges=True, byte_fallback=True, unk_token=unknown))
    spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
    # normalised is each stretch of text between special tokens: llama.cpp puts the space before every one of them
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *spaces] if vocabulary.adds_space else spaces
    )
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def split_into_pieces(backend: Tokenizer, vocabulary: FileVocabulary) -> None:
    """Make `backend` merge; not before it is copied, for what is written in Python cannot be."""
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(
        PieceSplitter(dict(zip(vocabulary.tokens, vocabulary.scores, strict=False)))
    )


class PieceSplitter:
    """Splits normalised text into pieces of a vocabulary and single characters that it does not have."""

    def __init__(self, scores: dict[str, float]) -> None:
        """`scores` are the pieces' own; of two neighbours that could merge, those that make the higher one do."""
        self._scores = scores
        self._inner = {a + b for piece in scores for a, b in pairwise(piece)}
        self._pieces_of = lru_cache(_CACHED_WORDS)(self._merge)

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Split every part of `text`; what the tokenizers library calls."""
        text.split(lambda number, part: list(_slices(part, self._blocks(str(part)))))
        text.split(lambda number, part: list(_slices(part, self.split(str(part)))))

    def split(self, text: str) -> list[str]:
        """Return the pieces of `text`; together they are it."""
        return [piece for word in self._words(text) for piece in self._pieces_of(word)]

    def _words(self, text: str) -> Iterator[str]:
        """Cut between characters that are neighbours in no piece: nothing merges across."""
        start = 0
        for at, pair in enumerate(map("".join, pairwise(text)), 1):
            if pair not in self._inner:
                yield text[start:at]
                start = at
        if text:
            yield text[start:]

    def _blocks(self, text: str) -> Iterator[str]:
        """Put words together up to a length."""
        block: list[str] = []
        size = 0
        for word in self._words(text):
            block.append(word)
            size += len(word)
            if size >= _BLOCK:
                yield "".join(block)
                block, size = [], 0
        if block:
            yield "".join(block)

    def _merge(self, word: str) -> tuple[str, ...]:
        pieces: list[str] = list(word)
        after = [*range(1, len(word)), -1]
        before = list(range(-1, len(word) - 1))
        candidates = [
            (-score, at, 2)
            for at, pair in enumerate(pairwise(word))
            if (score := self._score("".join(pair))) is not None
        ]
        heapify(candidates)
        while candidates:
            _, left, size = heappop(candidates)
            right = after[left]
            if not pieces[left] or right < 0 or len(pieces[left]) + len(pieces[right]) != size:
                continue  # one of the two has merged with another since
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            for at in (before[left], left):
                if at >= 0 and after[at] >= 0:
                    made = pieces[at] + pieces[after[at]]
                    if (score := self._score(made)) is not None:
                        heappush(candidates, (-score, at, len(made)))
        return tuple(filter(None, pieces))

    def _score(self, piece: str) -> float | None:
        return self._scores.get(piece)


def _slices(text: NormalizedString, parts: Iterator[str] | list[str]) -> Iterator[NormalizedString]:
    start = 0
    for part in parts:
        piece = text[start : start + len(part)]
        assert piece is not None, "a slice within a text is a text"
        yield piece
        start += len(part)
