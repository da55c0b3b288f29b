"""Templates: ``{one|other|}`` is a choice, ``[name]`` a value; both nest."""

from __future__ import annotations

import random
import re

_CHOICE = re.compile(r"\{([^{}]*)\}")
_VALUE = re.compile(r"\[(\w+)\]")
Turns = list[list[str]]


def expand(template: str, rng: random.Random, values: dict[str, str] | None = None) -> str:
    """``template`` with each choice made, innermost first, and each value put in; sentences get their capital letters."""
    text = template
    while _CHOICE.search(text):
        text = _CHOICE.sub(lambda m: rng.choice(m.group(1).split("|")), text)
    while values and _VALUE.search(text):
        text = _VALUE.sub(lambda m: values[m.group(1)], text)
    text = re.sub(r"\s+([,.!?])", r"\1", re.sub(r" +", " ", text)).strip()
    text = re.sub(r"(^|[.!?]\s+\"?|\n|\"(?=[a-z][^\"]*\"))([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)
    return re.sub(r"\b([Aa])n? (?=[\w])", _article, text)


def _article(match: re.Match[str]) -> str:
    """``a`` or ``an`` by the letter that follows."""
    following = match.string[match.end() : match.end() + 4].lower()
    vowel = following[:1] in "aeiou" and not following.startswith(("uni", "use", "one", "eu"))
    vowel = vowel or following.startswith(("hour", "hone"))
    return match.group(1) + ("n " if vowel else " ")


def sloppy(text: str, rng: random.Random) -> str:
    """A user's line as people type it: now and then without capitals, full stop or apostrophes."""
    draw = rng.random()
    if draw < 0.12:
        text = text.lower()
    if draw < 0.08 or 0.12 < draw < 0.18:
        text = text.rstrip(".?!")
    if draw < 0.03:
        text = text.replace("'", "")
    if 0.20 < draw < 0.24:
        text = (
            rng.choice(("Please tell me: ", "Hey, ", "Hi! ", "I have a question. ", "Okay, ", "So, ", "Well, ")) + text
        )
    return text


def exchange(user: str, assistant: str, rng: random.Random, values: dict[str, str] | None = None) -> Turns:
    """One question and its answer."""
    return [["user", sloppy(expand(user, rng, values), rng)], ["assistant", expand(assistant, rng, values)]]


def series(items: list[str], last: str = "and") -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
