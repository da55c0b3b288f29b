"""The bytes that a single token stands for, of byte-level and of SentencePiece vocabularies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["TokenBytes"]

# How byte-level vocabularies write the 256 bytes (GPT-2's alphabet): those that print as themselves, the others in
# order as the characters from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted({*range(256)} - {*_PRINTED})
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + at): byte for at, byte in enumerate(_OTHERS)}

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Called with a token id, returns its bytes; none for an id that no token has.

    A token on its own is not always text: it may be a part of a character, and its first space is one of the text's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._added = tokenizer, dict(tokenizer.added_tokens_decoder)
        decoder = tokenizer.backend_tokenizer.decoder
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._has_byte_tokens = any(step["type"] == "ByteFallback" for step in steps)
        self._written = dict(filter(None, map(_replaced, steps)))

    def __call__(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token].content).encode()
        piece = self._tokenizer.backend_tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            return b"".join(bytes([_BYTE_OF[one]]) if one in _BYTE_OF else one.encode() for one in piece)
        if self._has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for written, meant in self._written.items():
            piece = piece.replace(written, meant)
        return str(piece).encode()

    def is_special(self, token: int) -> bool:
        """Whether answers leave the token out of their text."""
        return token in self._added and bool(self._added[token].special)


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _steps(inner)
    else:
        yield decoder


def _replaced(step: dict[str, Any]) -> tuple[str, str] | None:
    """What stands for what in a vocabulary's pieces, by one step of its decoder."""
    if step["type"] == "Metaspace":
        return str(step["replacement"]), " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return str(step["pattern"]["String"]), str(step["content"])
    return None
