"""An answer ends at its stop string, wherever tokens begin and end, and no part of it is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe_kt.engine.text.stop_strings import StopStrings

ALPHABET = st.text("ab<é", max_size=12)


def naive(text: str, stops: list[str]) -> tuple[str, str]:
    """Read one character at a time; end where a stop string is complete, and say which."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], max(complete, key=len)
    return text, ""


@given(st.lists(ALPHABET, max_size=8), st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=3))
def test_any_pieces_end_where_the_text_does(pieces: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    said = ""
    for piece in pieces:
        said += watch.feed(piece)
        wanted, _ = naive("".join(pieces), stops)
        assert wanted.startswith(said)
    said += "" if watch.found else watch.flush()
    assert watch.found == bool(watch.which)
    assert (said, watch.which) == naive("".join(pieces), stops)


@pytest.mark.parametrize("text", ["no stop here", "almost <|en", ""])
def test_what_was_held_back_is_said_at_the_end(text: str) -> None:
    watch = StopStrings(["<|end|>"])
    assert watch.feed(text) + watch.flush() == text
    assert not watch.found


def test_nothing_is_held_back_without_need() -> None:
    watch = StopStrings(["\n\nUser:"])
    assert [watch.feed(piece) for piece in ("Hello", " there\n", "I", "\n\nUse", "r", ":x")] == [
        "Hello", " there", "\nI", "", "", "",
    ]  # fmt: skip
    assert watch.found
