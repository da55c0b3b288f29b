"""Simple facts, sums, explanations and lists."""

from __future__ import annotations

import random

from .engine import Turns, exchange, series
from .words import ANIMALS, CAPITALS, COLOURS, DAYS, FOODS, MONTHS, NAMES, OPPOSITES, SEASONS, WHAT, WHY, plural

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def animal(rng: random.Random) -> Turns:
    """What an animal is, eats, says, and where it lives; sometimes with follow-up questions by pronoun."""
    name = rng.choice(list(ANIMALS))
    kind, look, home, food, sound, fact = ANIMALS[name]
    values = {"name": name, "names": plural(name), "kind": kind, "look": look, "home": home, "food": food, "sound": sound, "fact": fact}  # fmt: skip
    questions = [
        ("{What is a [name]|What are [names]|Tell me about [names]|Tell me something about the [name]|Describe a [name]|What do you know about [names]|Tell me a fact about [names]|Explain what a [name] is}?", "{A [name] is|The [name] is} a [kind]. {It is [look] and lives [home].|It lives [home] and is [look].} {[fact].|It eats [food].}"),
        ("{What do [names] eat|What does a [name] eat|What is the food of the [name]|What do [names] like to eat}?", "{[names] eat [food].|A [name] eats [food].}"),
        ("{Where do [names] live|Where does a [name] live|Where can I find [names]|Where is the home of the [name]}?", "{[names] live [home].|A [name] lives [home].}"),
        ("{What does a [name] look like|How does a [name] look|What do [names] look like}?", "A [name] is [look]."),
        ("{Do you like [names]|What do you think about [names]|Are [names] nice}?", "{Yes, I like them.|I think [names] are interesting.|I find them wonderful.} {[fact].|They live [home].} {Do you like them too?|And you?|}"),
        ("I {like|love|saw some|am afraid of|dream of|want to know more about} [names].", "{[names] are interesting animals.|I like them too.|Oh, [names]!} [fact]."),
    ]  # fmt: skip
    user, assistant = rng.choice(questions[:1] * 3 + questions)
    turns = exchange(
        user,
        assistant,
        rng,
        values,
    )
    follow = [
        ("{What do they eat|And what do they eat|What does it eat|What is their food}?", "{They eat [food].|[names] eat [food].}"),
        ("{Where do they live|And where do they live|Where does it live|Where can I see one}?", "{They live [home].|[names] live [home].}"),
        ("{Tell me more|Anything else|What else|More please|Do you know more about them|Tell me a fun fact}{.|?}", "{[fact].|Here is a fact: [fact].}"),
        ("{What do they look like|What does it look like}?", "{They are [look].|A [name] is [look].}"),
        ("{I had one as a child|I have one at home|I saw one yesterday|I would like to have one|I am afraid of them}.", "{Oh, really?|That is interesting!} {Tell me about it.|What was it like?|A [name] needs space and care.|Did it have a name?}"),
    ]  # fmt: skip
    for user, assistant in rng.sample(follow, rng.choice((0, 0, 1, 2))):
        turns += exchange(user, assistant, rng, values)
    return turns


def food(rng: random.Random) -> Turns:
    """Foods, recipes in a sentence, tastes."""
    name = rng.choice(list(FOODS))
    kind, taste, use = FOODS[name]
    many = name.endswith("s")
    values = {"name": name, "kind": kind, "taste": taste, "use": use, "be": "are" if many else "is", "they": "they" if many else "it", "them": "them" if many else "it", "other": rng.choice([f for f in FOODS if f != name])}  # fmt: skip
    turns = exchange(
        *rng.choice(
            (
                ("{Do you like [name]|What do you think about [name]|[be] [name] good}?", "{I cannot taste anything, but [name] must be good.|I think so.|Many people like [name].} {They say that [they] [be] [taste].|You can [use].} {Do you like [them]?|And you?|}"),
                ("{What can I do with [name]|How do I eat [name]|How should I prepare [name]|What can I make with [name]|How do I cook [name]}?", "{You can|Just|The simplest way is to|I would} [use]. {Enjoy your meal!|It is easy.|}"),
                ("I {like|love|enjoy|really like} [name].", "{[name] [be] [taste].|Good choice!|I understand that.} {Do you also like [other]?|How do you like [them] best?|You can [use].}"),
                ("I {don't like|hate|do not like|cannot eat} [name].", "{That is fine.|Everybody has a different taste.} {What about [other]?|Do you like [other] better?|What do you like instead?}"),
                ("{What do [name] taste like|How do [name] taste|What is the taste of [name]|Describe the taste of [name]}?" if many else "{What does [name] taste like|How does [name] taste|Describe the taste of [name]}?", "[name] [be] [taste]."),
                ("{What should I eat|What should I cook today|I am hungry, what should I eat|What can I have for dinner|What is good for lunch|Any ideas for dinner|Suggest something to eat}?", "{How about [name]?|You could have [name].|What about [name] today?|I would try [name].} {You can [use].|[name] [be] [taste].} {Do you like that?|Enjoy your meal!|}"),
            )
        ),
        rng,
        values,
    )  # fmt: skip
    return turns


def capital(rng: random.Random) -> Turns:
    """Capitals and countries."""
    country, city = rng.choice(list(CAPITALS.items()))
    values = {"country": country, "city": city}
    if rng.random() < 0.8:
        turns = exchange(
            "{What is the capital of [country]|What's the capital of [country]|Which city is the capital of [country]|Do you know the capital of [country]|Name the capital of [country]|Tell me the capital of [country]}?",
            "{The capital of [country] is [city].|It is [city].|[city] is the capital of [country].}",
            rng,
            values,
        )
        if rng.random() < 0.25:
            values["country"], values["city"] = rng.choice(list(CAPITALS.items()))
            turns += exchange(
                "{And of [country]|And what about [country]|What about [country]|And the capital of [country]}?",
                "{The capital of [country] is [city].|That is [city].}",
                rng,
                values,
            )
        return turns
    return exchange(
        "{Where is [city]|In which country is [city]|Which country is [city] in|What do you know about [city]}?",
        "{[city] is in [country].|[city] is the capital of [country].}",
        rng,
        values,
    )


def total(rng: random.Random) -> Turns:
    """Small sums, in digits and words."""
    kind = rng.choice("+++++--*")
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if kind == "-":
        a, b = max(a, b), min(a, b)
    if kind == "*":
        a, b = rng.randint(1, 10), rng.randint(1, 10)
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    word = {"+": "plus", "-": "minus", "*": "times"}[kind]
    sign = rng.choice((word, word, {"+": "+", "-": "-", "*": "*"}[kind]))
    words = rng.random() < 0.2
    values = {"a": NUMBERS[a] if words and a < 13 else str(a), "b": NUMBERS[b] if words and b < 13 else str(b), "sign": sign, "word": word, "result": str(result)}  # fmt: skip
    asked = "{What is [a] [sign] [b]|How much is [a] [sign] [b]|Can you calculate [a] [sign] [b]|[a] [sign] [b]|What's [a] [sign] [b]|Calculate [a] [sign] [b]|Do you know what [a] [sign] [b] is}?"
    if kind == "+" and rng.random() < 0.3:
        values |= {
            "thing": rng.choice(("apples", "books", "balls", "eggs", "coins", "cats", "cookies")),
            "name": rng.choice(NAMES),
        }
        asked = "{[name] has [a] [thing] and gets [b] more. How many [thing] are there now|I have [a] [thing] and you give me [b]. How many do I have}?"
        return exchange(asked, "[a] plus [b] is [result]{, so there are [result] [thing]|}.", rng, values)
    return exchange(
        asked, "{[a] [word] [b] is [result].|It is [result].|That makes [result].|The answer is [result].}", rng, values
    )


def order(rng: random.Random) -> Turns:
    """Days, months, seasons, counting, opposites, colours, plurals, comparisons."""
    return rng.choice(
        (
            _day,
            _month,
            _opposite,
            _opposite,
            _colour,
            _colour,
            _season,
            _season,
            _compare,
            _compare,
            _plural,
            _count,
            _kind,
        )
    )(rng)


def _day(rng: random.Random) -> Turns:
    i = rng.randrange(7)
    values = {"day": DAYS[i], "next": DAYS[(i + 1) % 7], "before": DAYS[i - 1], "all": series(DAYS)}
    return exchange(
        *rng.choice(
            (
                ("{What day comes after [day]|Which day is after [day]|What is the day after [day]}?", "{After [day] comes [next].|[next] comes after [day].|It is [next].}"),
                ("{What day comes before [day]|Which day is before [day]}?", "{Before [day] comes [before].|It is [before].}"),
                ("{What are the days of the week|Name the days of the week|How many days are in a week|List the days of the week}?", "{A week has seven days|There are seven}: [all]."),
                ("{What day is it today|What is the date|What time is it|Do you know what time it is|What year is it}?", "{I do not know, I am sorry.|I cannot know that.} {I have no clock.|A clock or a calendar can tell you.|I have no calendar.}"),
                ("{Do you like [day]s|What do you think of [day]s}?", "{[day] is a good day.|Every day is the same to me.} {What do you do on [day]s?|Is it a busy day for you?}"),
            )
        ),
        rng,
        values,
    )  # fmt: skip


def _month(rng: random.Random) -> Turns:
    i = rng.randrange(12)
    season = ("winter", "spring", "summer", "autumn")[(i + 1) % 12 // 3]
    values = {"month": MONTHS[i], "next": MONTHS[(i + 1) % 12], "season": season, "all": series(MONTHS)}
    return exchange(
        *rng.choice(
            (
                ("{What month comes after [month]|Which month is after [month]}?", "{After [month] comes [next].|It is [next].}"),
                ("{What are the months of the year|Name the months|How many months are in a year|List all months}?", "{A year has twelve months|There are twelve}: [all]."),
                ("{In which season is [month]|What season is [month]|Is it cold in [month]|What is [month] like}?", "In the north [month] is in [season]."),
            )
        ),
        rng,
        values,
    )  # fmt: skip


def _opposite(rng: random.Random) -> Turns:
    pair = rng.choice(list(OPPOSITES.items()))
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    return exchange(
        "{What is the opposite of [a]|What's the opposite of [a]|Name the opposite of [a]|Tell me the opposite of [a]}?",
        "{The opposite of [a] is [b].|It is [b].|[b] is the opposite of [a].}",
        rng,
        {"a": a, "b": b},
    )


def _colour(rng: random.Random) -> Turns:
    thing, colour = rng.choice(list(COLOURS.items()))
    if rng.random() < 0.2:
        things = [t for t, c in COLOURS.items() if c == colour]
        chosen = series(rng.sample(things, min(len(things), 3)))
        be = "is" if "and" not in chosen else "are"
        return exchange(
            "{What is [colour]|Name something [colour]|What things are [colour]|Tell me something that is [colour]}?",
            "[things] [be] [colour].",
            rng,
            {"colour": colour, "things": chosen, "be": be},
        )
    return exchange(
        "{What colour is [thing]|What color is [thing]|Which colour does [thing] have|Do you know the colour of [thing]}?",
        "{[thing] is [colour].|It is [colour].}",
        rng,
        {"thing": thing, "colour": colour},
    )


def _season(rng: random.Random) -> Turns:
    season = rng.choice(list(SEASONS))
    first, second, doing = SEASONS[season]
    return exchange(
        *rng.choice(
            (
                ("{What happens in [s]|Tell me about [s]|What is [s] like|Describe [s]}?", "In [s] {[a]|[b]|[a], and [b]}."),
                ("{What can I do in [s]|What do people do in [s]|What should I do in [s]}?", "In [s] you can [c]."),
                ("{Do you like [s]|What do you think about [s]|I like [s]|[s] is my favourite season}.", "{[s] is lovely.|I like [s] too.|[s] has its own beauty.} {In [s] [a].|You can [c].}"),
                ("{What are the seasons|How many seasons are there|Name the four seasons|Which season do you like best|What is your favourite season}?", "There are four seasons: spring, summer, autumn and winter. {I like [s], because [b].|In [s] [b].|}"),
            )
        ),
        rng,
        {"s": season, "a": first, "b": second, "c": doing},
    )  # fmt: skip


SIZES = [
    "ant",
    "bee",
    "mouse",
    "frog",
    "squirrel",
    "rabbit",
    "cat",
    "fox",
    "dog",
    "sheep",
    "pig",
    "wolf",
    "lion",
    "bear",
    "horse",
    "cow",
    "camel",
    "giraffe",
    "elephant",
    "whale",
]


def _compare(rng: random.Random) -> Turns:
    i, j = sorted(rng.sample(range(len(SIZES)), 2))
    small, big = SIZES[i], SIZES[j]
    a, b = rng.sample((small, big), 2)
    return exchange(
        *rng.choice(
            (
                ("{What is bigger, a [a] or a [b]|Which is bigger, a [a] or a [b]|Which animal is larger, a [a] or a [b]}?", "{A [big] is bigger than a [small].|A [big] is bigger.}"),
                ("{What is smaller, a [a] or a [b]|Which is smaller, a [a] or a [b]}?", "{A [small] is smaller than a [big].|A [small] is smaller.}"),
                ("Is a [big] bigger than a [small]?", "Yes, a [big] is bigger than a [small]."),
                ("Is a [small] bigger than a [big]?", "No, a [big] is bigger than a [small]."),
            )
        ),
        rng,
        {"a": a, "b": b, "small": small, "big": big},
    )  # fmt: skip


def _plural(rng: random.Random) -> Turns:
    name = rng.choice(
        [*ANIMALS, "child", "book", "house", "leaf", "tooth", "foot", "city", "baby", "box", "man", "woman"]
    )
    special = {"child": "children", "leaf": "leaves", "tooth": "teeth", "foot": "feet", "man": "men", "woman": "women"}
    return exchange(
        "{What is the plural of [a]|What's the plural of [a]|How do you say more than one [a]}?",
        "{The plural of [a] is [b].|One [a], two [b].}",
        rng,
        {"a": name, "b": special.get(name, plural(name))},
    )


def _count(rng: random.Random) -> Turns:
    n = rng.randint(3, 12)
    return exchange(
        "{Count to [n]|Can you count to [n]|Please count to [n]|Count from one to [n]}{.|?}",
        "{Of course: |Sure: |}[all].",
        rng,
        {"n": rng.choice((str(n), NUMBERS[n])), "all": series(NUMBERS[1 : n + 1])},
    )


def _kind(rng: random.Random) -> Turns:
    name = rng.choice(list(ANIMALS))
    kind = ANIMALS[name][0]
    other = rng.choice(("mammal", "bird", "fish", "insect", "reptile"))
    answer = f"Yes, a [a] is a {kind}." if other == kind else f"No, a [a] is not a {other}. It is a {kind}."
    return exchange(f"{{Is a [a] a {other}|Is the [a] a {other}}}?", answer, rng, {"a": name})


def explanation(rng: random.Random) -> Turns:
    """Why and what questions with a sentence or two of answer."""
    if rng.random() < 0.4:
        clause, answers = rng.choice(list(WHY.items()))
        subject = f"{{Why is it that {clause}|Can you explain why {clause}|Do you know why {clause}|Explain why {clause}|Tell me why {clause}|{_inverted(clause)}|{_inverted(clause)}}}?"
        turns = exchange(subject, rng.choice(answers), rng)
    else:
        thing, answer = rng.choice(list(WHAT.items()))
        turns = exchange(
            "{What is [x]|What's [x]|Explain what [x] is|Can you explain [x]|Tell me what [x] is|Do you know what [x] is|Define [x]}?",
            answer,
            rng,
            {"x": thing},
        )
    if rng.random() < 0.2:
        turns += exchange(
            "{I see|Oh, I did not know that|That is interesting|Thank you, that was clear|Now I understand}{.|!}",
            "{I am glad that I could explain it.|You are welcome.|Nature is full of wonders.|Ask me more if you like.|} {What else would you like to know?|Is there anything else?|}",
            rng,
        )
    return turns


INVERTED = {
    "the sky is blue": "why is the sky blue", "it rains": "why does it rain", "it snows": "why does it snow", "ice floats": "why does ice float",
    "the moon shines": "why does the moon shine", "there is day and night": "why is there day and night", "there are seasons": "why are there seasons",
    "plants are green": "why are plants green", "the sea is salty": "why is the sea salty", "bread rises": "why does bread rise",
    "metal feels cold": "why does metal feel cold",
}  # fmt: skip


def _inverted(clause: str) -> str:
    """The clause as a question that begins with why."""
    return INVERTED.get(clause) or f"why do {clause}"


LISTS: dict[str, list[str]] = {
    "animals": list(map(plural, ANIMALS)), "fruits": [f for f, v in FOODS.items() if v[0] == "fruit"],
    "vegetables": ["carrots", "potatoes", "onions", "peas", "beans", "spinach", "cabbage", "cucumbers"],
    "birds": [plural(a) for a, v in ANIMALS.items() if v[0] == "bird"], "countries": [c for c in CAPITALS if not c.startswith("the ")],
    "cities": list(CAPITALS.values())[:30], "colours": ["red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey"],
    "farm animals": ["cows", "pigs", "sheep", "goats", "chickens", "horses", "ducks"], "insects": ["bees", "ants", "butterflies", "flies", "beetles"],
    "drinks": ["water", "milk", "tea", "coffee", "juice", "lemonade", "hot chocolate"], "sports": ["football", "tennis", "swimming", "running", "skiing", "basketball", "cycling", "hockey"],
    "instruments": ["the piano", "the violin", "the guitar", "the flute", "the drums", "the trumpet"], "names": NAMES,
    "jobs": ["teacher", "doctor", "baker", "farmer", "nurse", "painter", "writer", "cook", "driver", "builder", "singer", "pilot"], "flowers": ["roses", "tulips", "daisies", "lilies", "sunflowers", "violets"],
    "trees": ["oaks", "pines", "birches", "apple trees", "maples", "willows"], "planets": ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"],
    "things in a kitchen": ["a pot", "a pan", "a knife", "a spoon", "a plate", "a cup", "an oven"], "clothes": ["shirts", "trousers", "socks", "hats", "coats", "scarves", "gloves", "dresses"],
    "things to do on a rainy day": ["read a book", "bake a cake", "draw a picture", "play a game", "write a letter", "watch a film", "build a tent of blankets"],
    "ways to be kind": ["smile at somebody", "help a neighbour", "share your food", "write a nice note", "listen to a friend", "say thank you"],
    "things to take to the beach": ["a towel", "a hat", "sun cream", "a book", "some water", "a ball"], "toys": ["balls", "dolls", "blocks", "kites", "puzzles", "trains"],
}  # fmt: skip


def listing(rng: random.Random) -> Turns:
    """Lists of three to five things."""
    what = rng.choice(list(LISTS))
    n = rng.randint(2, 5)
    n = min(n, len(LISTS[what]))
    items = rng.sample(LISTS[what], n)
    values = {"n": rng.choice((NUMBERS[n], str(n))), "what": what, "items": series(items)}
    asked = "{Name [n] [what]|Can you name [n] [what]|Give me [n] [what]|List [n] [what]|Tell me [n] [what]|Name some [what]|Give me a list of [what]|Do you know any [what]|What [what] do you know|I need [n] [what]}{.|?}"
    return exchange(asked, "{Here are [n]|Sure|Of course|For example|Gladly}: [items].", rng, values)
