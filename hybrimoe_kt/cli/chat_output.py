"""How an answer reaches the terminal: piece by piece, wrapped between words, without control characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from prompt_toolkit.utils import get_cwidth

__all__ = ["StreamPrinter", "flatten", "health_word", "summary_line", "visible"]

TAB = "    "


def visible(text: str, tab: str = TAB) -> str:
    """Drop what could steer the terminal (a model may write escape sequences); keep newlines, write tabs as `tab`."""
    kept = text.replace("\r\n", "\n").replace("\t", tab)
    return "".join(char for char in kept if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs"))


class StreamPrinter:
    """Writes text as it comes; a word that meets the right edge moves to the next line.

    `width` None (no terminal) writes lines as they are.
    """

    def __init__(self, write: Callable[[str], object], width: int | None) -> None:
        self._write = write
        self._limit = width - 1 if width else None  # the last column is left free: some terminals wrap early
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> None:
        """Write one piece."""
        text, limit = visible(text), self._limit
        self._write(text if limit is None else "".join(self._placed(char, limit) for char in text))

    def end_line(self) -> None:
        """Start a new line unless one has just started."""
        if self._limit is None or self._column:
            self._write("\n")
        self._column, self._word = 0, ""

    def _placed(self, char: str, limit: int) -> str:
        if char == "\n":
            self._column, self._word = 0, ""
            return char
        width = get_cwidth(char)
        if self._column + width <= limit:
            self._column += width
            self._word = "" if char == " " else self._word + char
            return char
        if char == " ":
            self._column, self._word = 0, ""
            return "\n"
        return self._moved_down(char, width)

    def _moved_down(self, char: str, width: int) -> str:
        """Break the line before the word that `char` continues; a word as long as the line is cut."""
        word_width = get_cwidth(self._word)
        if not self._word or word_width >= self._column:
            self._column, self._word = width, char
            return "\n" + char
        self._word += char
        self._column = word_width + width
        return f"\x1b[{word_width}D\x1b[K\n{self._word}"


def summary_line(run: Mapping[str, Any]) -> str:
    """Return one line about an answer, at most 80 columns for usual numbers."""
    parts = [
        f"{run['prompt_tokens']} in at {run['prefill_tokens_per_s']:.1f}/s",
        f"{run['new_tokens']} out at {run['decode_tokens_per_s']:.1f}/s",
        f"experts {short(run['experts_on_cpu'])} CPU {short(run['experts_on_gpu'])} GPU",
    ]
    if run["experts_on_gpu"] or run["transfers"]:
        parts.append(f"{run['hit_rate']:.0%} hits")
    if word := health_word(run):
        parts.append(word)
    return " · ".join(parts)


def health_word(run: Mapping[str, Any]) -> str:
    """What went wrong on an accelerator in one word, empty where nothing did: its answers look right all the same."""
    return str(run.get("health", {}).get("word", ""))


def short(count: int) -> str:
    """Return a count in at most five characters: 950, 12.3k, 4.5M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            return f"{count / min(size, 10**3 if unit == 'k' else size):.1f}{unit}"
    return str(count)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested statistics as rows of dotted names and readable values."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", f"{value:.4g}" if isinstance(value, float) else visible(str(value))))
    return rows
