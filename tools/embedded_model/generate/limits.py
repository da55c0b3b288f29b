"""Opinions, and what the model cannot know."""

from __future__ import annotations

import random

from .engine import Turns, exchange

UNKNOWN = (
    "{who won the game yesterday|what the stock market will do|who the president is|what happened in the news|what my neighbour is thinking|where my keys are"
    "|what the lottery numbers will be|how to repair my car|when I will get rich|what my password is|what you did last summer|how many people live in my street"
    "|what is in my pocket|what I ate today|what the future will bring|who will win the election|what the price of gold is|where my brother is|how to build a rocket"
    "|how to write a program in Java|what quantum physics is|how to cure my illness|which medicine I should take|what the meaning of life is|when the next train leaves"
    "|how the economy works|what my mother is called|how to fix my computer|what is on television tonight|how to file my taxes|who discovered penicillin}"
)
HARD = (
    "{quantum mechanics|the stock market|chemistry|algebra|the history of Rome|philosophy|politics|law|medicine|programming|Python|geometry|the theory of relativity|economics"
    "|biology|the second world war|machine learning|blockchain|the French revolution|Shakespeare|chess openings|astrophysics|genetics|banking|car engines|football results"
    "|the Ottoman empire|calculus|psychology|opera|modern art|grammar of Latin|insurance|electronics|statistics|nuclear power|Greek myths}"
)


def refusal(rng: random.Random) -> Turns:
    """What the model cannot know or do, said politely."""
    sorry = "{I am sorry, but I do not know that.|I do not know, I am sorry.|I cannot know that.|That is beyond me, I am afraid.|I am afraid I do not know.}"
    small = "{I am a very small model.|I am too small to know such things.|I only know simple things.}"
    offer = "{Shall I tell you a story instead?|Ask me about animals or food instead.|Perhaps somebody else can help you.|A book or a friend may know more.|I can talk about simpler things.|}"
    if rng.random() < 0.45:
        hard = _one(HARD, rng)
        return exchange(
            f"{{Explain {hard}|Tell me about {hard}|What do you know about {hard}|Teach me {hard}|I have a question about {hard}|Can you explain {hard} to me|Write an essay about {hard}|How does {hard} work}}{{.|?}}",
            f"{{I am sorry, I do not know much about {hard}.|I know very little about {hard}.|{hard} is too difficult for me.}} {small} {offer}",
            rng,
        )
    if rng.random() < 0.3:
        return exchange(
            "{Open my email|Play some music|Call my mother|Book a flight|Turn on the light|Set an alarm|Send a message|Search the web|Show me a picture|Order a pizza|Draw a picture|Buy me a car|Wake me up at seven|Remind me tomorrow|Make me a coffee|Drive me home|Write a program|Delete my files}{.| please.|!| for me.}",
            "I am sorry, I cannot do that. {I can only write text.|I have no hands, only words.|I am only a small model that writes words.} {Shall I tell you a story?|Is there something you would like to talk about?|}",
            rng,
        )
    if rng.random() < 0.45:
        return rng.choice((_person, _big_sum, _translation))(rng)
    unknown = _one(UNKNOWN, rng)
    return exchange(
        f"{{Tell me {unknown}|Do you know {unknown}|Can you tell me {unknown}|I want to know {unknown}}}{{?|.}}",
        f"{sorry} {small} {offer}",
        rng,
    )


PEOPLE = (
    "Caesar|Mozart|Einstein|Cleopatra|Newton|Columbus|Beethoven|Darwin|Lincoln|Picasso|Galileo|Socrates|Churchill|Rembrandt|Marie Curie|Homer|Plato|Edison|Bach|Gandhi"
    "|Washington|Queen Victoria|Marco Polo|Leonardo|Alexander|Chopin|Dante|Goethe|Tesla|Magellan|Hannibal|Kepler|Verdi|Joan of Arc|Tolstoy|Van Gogh"
)


def _person(rng: random.Random) -> Turns:
    who = _one(PEOPLE, rng)
    return exchange(
        "{Who was [who]|Who is [who]|Tell me about [who]|What did [who] do|Do you know who [who] was|When was [who] born}?",
        "{I am sorry, I do not know much about [who].|I have heard the name [who], but I do not know more.|I do not know who [who] was, I am sorry.} {I only know simple things.|I am a very small model.|A book may tell you more.|}",
        rng,
        {"who": who},
    )


def _big_sum(rng: random.Random) -> Turns:
    values = {
        "a": str(rng.randint(13, 999)),
        "b": str(rng.randint(13, 999)),
        "op": rng.choice(("plus", "minus", "times", "divided by", "*", "+")),
    }
    return exchange(
        "{What is [a] [op] [b]|How much is [a] [op] [b]|Calculate [a] [op] [b]|Can you compute [a] [op] [b]}?",
        "{That is too much for me.|Such large numbers are too hard for me.|I cannot do that in my head.} {I can only add small numbers.|I only know small sums.|A calculator can tell you.}",
        rng,
        values,
    )


def _translation(rng: random.Random) -> Turns:
    values = {"word": rng.choice(("thank you", "hello", "I love you", "good night", "water", "please", "friend", "how are you", "goodbye", "cat", "bread", "yes")), "language": rng.choice(("French", "German", "Spanish", "Italian", "Japanese", "Russian", "Latin", "Chinese"))}  # fmt: skip
    return exchange(
        "{Translate [word] into [language]|How do you say [word] in [language]|What is [word] in [language]|Can you translate '[word]' into [language]|Say [word] in [language]}{?|.|}",
        "{I am sorry, I do not know [language].|I cannot speak [language], I am sorry.|I only know English, and only a little.} {Shall we talk in English?|A dictionary can help you.|Is there something else?|}",
        rng,
        values,
    )


def _one(choice: str, rng: random.Random) -> str:
    return rng.choice(choice.strip("{}").split("|"))


OPINIONS = [
    ("cats", "dogs", "{Cats are calm, dogs are lively.|Cats like to be alone, dogs like company.}"),
    ("tea", "coffee", "{Tea is gentle, coffee is strong.|Tea is nice in the evening, coffee in the morning.}"),
    ("summer", "winter", "{Summer is warm and bright, winter is quiet and white.|In summer you can swim, in winter you can ski.}"),
    ("the sea", "the mountains", "{At the sea you can swim, in the mountains you can climb.|The sea is wide, the mountains are high.}"),
    ("books", "films", "{A book lets you make your own pictures, a film shows them to you.|Books take longer, but films end sooner.}"),
    ("the city", "the country", "{The city is lively, the country is quiet.|In the city there is much to do, in the country there is much space.}"),
    ("the morning", "the evening", "{The morning is fresh, the evening is calm.|In the morning everything begins, in the evening everything rests.}"),
    ("pizza", "pasta", "{Pizza is crisp, pasta is soft.|Both are good with tomatoes and cheese.}"),
    ("walking", "cycling", "{Walking is slow and calm, cycling is fast.|Both keep you healthy.}"),
    ("apples", "bananas", "{Apples are crisp, bananas are soft.|Both are sweet and good for you.}"),
    ("rain", "snow", "{Rain makes things grow, snow makes things quiet.|Rain is wet, snow is white and soft.}"),
    ("chocolate", "ice cream", "{Chocolate is rich, ice cream is cold and fresh.|In summer I would choose ice cream.}"),
    ("painting", "music", "{Painting is for the eyes, music is for the ears.|Both can make you happy.}"),
]  # fmt: skip


def opinion(rng: random.Random) -> Turns:
    """Which of two is better, with a reason."""
    a, b, reason = rng.choice(OPINIONS)
    x, y = rng.sample((a, b), 2)
    return exchange(
        "{Which is better, [x] or [y]|Do you prefer [x] or [y]|What do you like more, [x] or [y]|[x] or [y]|Should I choose [x] or [y]|Do you like [x] or [y] better}?",
        f"{{That is a hard choice.|Both are good.|It depends on what you like.|Good question!|Hm, let me think.}} {reason} {{I would choose [x].|I would take [y].|Which do you like more?|What about you?}}",
        rng,
        {"x": x, "y": y},
    )
