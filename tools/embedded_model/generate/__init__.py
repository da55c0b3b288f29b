"""Text written by our own rules: dialogues of many kinds and small stories; no line of it comes from elsewhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from . import advice, everyday, knowledge, limits, stories, talk, world
from .engine import Turns

# How often each kind begins a dialogue.
KINDS: dict[Callable[[random.Random], Turns], float] = {
    talk.greeting: 6, talk.good_news: 4, talk.bad_news: 9, talk.about_me: 9, talk.introduction: 8, talk.thanks: 1.5, talk.farewell: 2,
    talk.agreement: 1.5, talk.weather: 4, talk.smalltalk_lead: 4, knowledge.animal: 14, knowledge.food: 6, knowledge.capital: 9,
    knowledge.total: 9, knowledge.order: 13, knowledge.explanation: 8, knowledge.listing: 6, limits.refusal: 6, limits.opinion: 4,
    advice.advice: 8, advice.joke: 4, advice.poem: 2.5, stories.story: 9, world.objects: 5, world.jobs: 4, world.places: 4,
    world.abilities: 3, world.rhyme: 1.5, world.numbers: 5, everyday.tastes: 6, everyday.pet: 7, everyday.suggestion: 16, everyday.family: 5,
}  # fmt: skip
# What may follow in a longer conversation.
LATER = [k for k in KINDS if k not in (talk.greeting, talk.introduction, talk.farewell)]


def dialogue(rng: random.Random) -> Turns:
    """One exchange, or several of different kinds, as in a chat."""
    turns: Turns = []
    kinds, weights = list(KINDS), list(KINDS.values())
    first = rng.choices(kinds, weights)[0]
    turns += first(rng)
    more = 0 if first is talk.farewell else rng.choices((0, 1, 2, 3), (0.5, 0.25, 0.15, 0.1))[0]
    for _ in range(more):
        turns += rng.choices(LATER, [KINDS[k] for k in LATER])[0](rng)
    if len(turns) > 2 and rng.random() < 0.2:
        turns += rng.choice((talk.thanks, talk.farewell))(rng)
    return turns


def documents(count: int, seed: int) -> Iterator[dict]:
    """``count`` documents (see ``data.render``), the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield {"turns": dialogue(rng)}
