"""Where in a text each of its tokens stands."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import NamedTuple

from .token_bytes import TokenBytes

__all__ = ["Spelled", "Spelling"]


class Spelled(NamedTuple):
    """A token as its text has it."""

    bytes: bytes
    offset: int
    """Characters of the text that are complete before it."""


class Spelling:
    """Follows one text. The bytes of all its tokens, special ones that it leaves out aside, are the text's."""

    def __init__(self, bytes_of: TokenBytes) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text, self._at, self._at_start = "", 0, True

    def turn(self) -> None:
        """The prompt ends here, and the answer begins: its first space may be missing as a text's may."""
        self._at_start = True

    def spell(self, text: str, tokens: Iterable[int]) -> list[Spelled]:
        """Go on with `text`, in which `tokens` are complete."""
        self._text += text
        return [self._one(token) for token in tokens]

    def _one(self, token: int) -> Spelled:
        written, offset = self._bytes_of(token), self._at
        rest = self._text[offset : offset + len(written) + 1]
        if self._bytes_of.is_special(token):
            if rest.startswith(written.decode()):
                self._at += len(written.decode())
            return Spelled(written, offset)
        if self._at_start and written.startswith(b" ") and rest and not rest.startswith(" "):
            written = written[1:]  # SentencePiece puts a space before every text, and decoders take it off
        self._at_start = False
        self._at += len(self._decoder.decode(written))
        return Spelled(written, offset)
