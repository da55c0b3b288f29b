"""Log-probabilities in the shapes of all interfaces. Their tokens spell the text, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrimoe_kt.engine.sampler import Sampled
from hybrimoe_kt.engine.text.spelling import Spelled
from hybrimoe_kt.engine.vocabulary import Vocabulary

__all__ = ["ShownLogprobs"]


class ShownLogprobs:
    """Writes those of one text, stretch by stretch."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._bytes_of, self._spelling = vocabulary.bytes_of, vocabulary.spelling()

    def of_chat(self, text: str, sampled: Sequence[Sampled]) -> list[dict[str, Any]]:
        """Return a conversation's: token, logprob, bytes, and the same of the likeliest."""
        return [
            _entry(spelled.bytes, one.logprob)
            | {"top_logprobs": [_entry(written, logprob) for written, logprob in self._likeliest(one, spelled)]}
            for one, spelled in self._spelled(text, sampled)
        ]

    def of_completion(self, text: str, sampled: Sequence[Sampled]) -> dict[str, list[Any]]:
        """Return a plain completion's: four lists of one entry a token; offsets are characters of the text."""
        shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one, spelled in self._spelled(text, sampled):
            best: dict[str, float] = {}
            for written, logprob in self._likeliest(one, spelled):
                best.setdefault(_name(written), logprob)
            if one.logprob is not None:
                best.setdefault(_name(spelled.bytes), one.logprob)
            shown["tokens"].append(_name(spelled.bytes))
            shown["token_logprobs"].append(one.logprob)
            shown["top_logprobs"].append(None if one.logprob is None else best)
            shown["text_offset"].append(spelled.offset)
        return shown

    def turn(self) -> None:
        """The prompt is told, and the answer begins."""
        self._spelling.turn()

    def _spelled(self, text: str, sampled: Sequence[Sampled]) -> list[tuple[Sampled, Spelled]]:
        return list(zip(sampled, self._spelling.spell(text, [one.token for one in sampled]), strict=True))

    def _likeliest(self, one: Sampled, spelled: Spelled) -> list[tuple[bytes, float]]:
        return [
            (spelled.bytes if token == one.token else self._bytes_of(token), logprob)
            for token, logprob in one.likeliest
        ]


def _entry(written: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _name(written), "logprob": logprob, "bytes": list(written)}


def _name(written: bytes) -> str:
    r"""A token's text; a part of a character, which has none, as OpenAI does it: "bytes:\xe6\x97"."""
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
