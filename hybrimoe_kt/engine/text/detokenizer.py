"""Token ids to text as they come: a piece never ends within a character."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

__all__ = ["IncrementalDetokenizer"]


class IncrementalDetokenizer:
    """Turns an answer's tokens into text; the pieces and `flush` together are the text of all of them."""

    def __init__(self, tokenizer: Tokenizer, *, keep_special: bool | Collection[str] = False) -> None:
        """With `keep_special`, all or those named, tokens the tokenizer calls special are text as well."""
        self._tokenizer, self._skip = tokenizer, keep_special is False
        self._hidden: set[int] = set()
        if not isinstance(keep_special, bool):
            added = tokenizer.get_added_tokens_decoder().items()
            self._hidden = {token for token, text in added if text.special and text.content not in keep_special}
        self._stream = DecodeStream(skip_special_tokens=self._skip)
        self._tokens: list[int] = []
        self._said = ""

    def step(self, token: int) -> str:
        """Return the text that `token` completes, often none."""
        if token in self._hidden:
            return ""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._said += piece
        return piece

    def flush(self) -> str:
        """Return what is left at the end: a character that was never completed, as U+FFFD, and what came with it."""
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip)
        rest = text.removeprefix(self._said) if text.startswith(self._said) else ""
        self._said += rest
        return rest
