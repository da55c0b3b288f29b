"""Objects, jobs, places, abilities, rhymes, numbers: more of the small world, asked about in many ways."""

from __future__ import annotations

import random

from .engine import Turns, exchange, series

# thing: (what it is for, where it is)
OBJECTS: dict[str, tuple[str, str]] = {
    "knife": ("to cut things", "in the kitchen"), "spoon": ("to eat soup", "in the kitchen"), "fork": ("to pick up food", "in the kitchen"),
    "cup": ("to drink from", "in the kitchen"), "plate": ("to put food on", "on the table"), "pan": ("to fry food", "on the stove"),
    "oven": ("to bake bread and cakes", "in the kitchen"), "fridge": ("to keep food cold", "in the kitchen"), "kettle": ("to boil water", "in the kitchen"),
    "table": ("to eat and work at", "in a room"), "chair": ("to sit on", "at a table"), "bed": ("to sleep in", "in the bedroom"),
    "lamp": ("to give light", "in a room"), "mirror": ("to see yourself", "on the wall"), "clock": ("to see what time it is", "on the wall"),
    "door": ("to go in and out", "in the wall of a house"), "window": ("to let light and air in", "in the wall of a house"), "key": ("to open a lock", "in a pocket"),
    "pen": ("to write", "on a desk"), "pencil": ("to write and draw", "on a desk"), "book": ("to read", "on a shelf"), "paper": ("to write on", "on a desk"),
    "scissors": ("to cut paper and cloth", "in a drawer"), "needle": ("to sew", "in a sewing box"), "hammer": ("to hit nails", "in a tool box"),
    "saw": ("to cut wood", "in a workshop"), "ladder": ("to climb up", "in a shed"), "bucket": ("to carry water", "in a shed"), "rope": ("to tie things", "on a boat"),
    "umbrella": ("to stay dry in the rain", "next to the door"), "coat": ("to keep warm", "in a wardrobe"), "hat": ("to keep the head warm", "on a hook"),
    "shoe": ("to protect the feet", "next to the door"), "glove": ("to keep the hands warm", "in a pocket"), "scarf": ("to keep the neck warm", "on a hook"),
    "towel": ("to dry yourself", "in the bathroom"), "soap": ("to wash your hands", "in the bathroom"), "toothbrush": ("to clean your teeth", "in the bathroom"),
    "comb": ("to tidy your hair", "in the bathroom"), "bicycle": ("to ride from place to place", "in front of the house"), "car": ("to drive", "on the road"),
    "bus": ("to carry many people", "on the road"), "train": ("to travel far on rails", "at the station"), "boat": ("to travel on water", "in a harbour"),
    "plane": ("to fly", "at the airport"), "bridge": ("to cross a river", "over a river"), "phone": ("to talk to people far away", "in a pocket"),
    "computer": ("to work, to write and to play", "on a desk"), "camera": ("to take pictures", "in a bag"), "radio": ("to hear news and music", "in a room"),
    "ball": ("to play", "in the garden"), "kite": ("to fly in the wind", "in the sky"), "doll": ("to play", "in a child's room"), "piano": ("to make music", "in a living room"),
    "guitar": ("to make music", "in a bag or on the wall"), "drum": ("to make a rhythm", "in a music room"), "candle": ("to give a soft light", "on a table"),
    "blanket": ("to keep warm in bed", "on a bed"), "pillow": ("to rest the head on", "on a bed"), "basket": ("to carry things", "in the kitchen"),
    "map": ("to find the way", "in a bag"), "compass": ("to find the north", "in a bag"), "tent": ("to sleep outside", "in the forest"), "lantern": ("to see in the dark", "in a tent"),
    "shovel": ("to dig", "in the garden"), "fence": ("to keep animals in or out", "around a garden"), "glasses": ("to see better", "on the nose"),
    "wallet": ("to keep money", "in a pocket"), "stamp": ("to send a letter", "on a letter"), "vase": ("to hold flowers", "on a table"),
}  # fmt: skip
MANY = {"scissors", "glasses"}

# job: what they do
JOBS: dict[str, str] = {
    "doctor": "helps sick people", "nurse": "takes care of sick people", "teacher": "helps people to learn", "baker": "bakes bread and cakes",
    "farmer": "grows food and keeps animals", "cook": "prepares meals", "waiter": "brings food to the table", "gardener": "takes care of plants",
    "painter": "paints pictures or walls", "writer": "writes books", "singer": "sings songs", "musician": "plays an instrument", "dancer": "dances on a stage",
    "actor": "plays in films or in a theatre", "pilot": "flies planes", "driver": "drives a bus or a car", "sailor": "works on a ship", "fisherman": "catches fish",
    "builder": "builds houses", "carpenter": "makes things of wood", "plumber": "repairs water pipes", "electrician": "repairs electric lines",
    "mechanic": "repairs cars", "engineer": "plans machines and bridges", "scientist": "studies how the world works", "programmer": "writes programs for computers",
    "librarian": "takes care of books", "postman": "brings letters", "policeman": "keeps people safe", "fireman": "puts out fires", "judge": "decides in a court",
    "lawyer": "helps people with the law", "dentist": "takes care of teeth", "vet": "helps sick animals", "hairdresser": "cuts hair", "tailor": "makes clothes",
    "butcher": "sells meat", "shopkeeper": "sells things", "astronaut": "travels into space", "clown": "makes people laugh", "king": "rules a country", "student": "learns at a school",
}  # fmt: skip

# place: what one does there
PLACES: dict[str, str] = {
    "a library": "read and borrow books", "a school": "learn", "a park": "walk, play and sit in the grass", "a beach": "swim and lie in the sun",
    "a museum": "look at old and beautiful things", "a cinema": "watch films", "a restaurant": "eat a meal", "a bakery": "buy bread", "a market": "buy fresh food",
    "a hospital": "get well", "a station": "take a train", "an airport": "take a plane", "a harbour": "see ships", "a farm": "see animals and plants",
    "a forest": "walk and listen to the birds", "a zoo": "see animals from far away", "a theatre": "watch a play", "a swimming pool": "swim", "a bank": "bring and fetch money",
    "a post office": "send letters", "a church": "pray or be quiet", "a kitchen": "cook", "a garden": "grow flowers and vegetables", "an office": "work",
    "a castle": "see how kings lived", "a mountain": "climb and look far", "a lake": "swim and row a boat", "a playground": "play", "a café": "drink coffee and talk", "a hotel": "sleep when you travel",
}  # fmt: skip

# who: can, cannot
CAN: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "birds": (("fly", "sing", "lay eggs"), ("read", "drive a car")), "fish": (("swim", "breathe under water"), ("walk", "sing")), "cats": (("climb trees", "see well at night", "jump high"), ("fly", "talk")),
    "dogs": (("smell very well", "run fast", "swim"), ("fly", "climb trees well")), "penguins": (("swim", "dive"), ("fly",)), "bats": (("fly", "find their way in the dark"), ("read",)),
    "horses": (("run fast", "jump over fences", "sleep standing up"), ("climb trees",)), "babies": (("cry", "laugh", "sleep a lot"), ("read", "cook")), "trees": (("grow for hundreds of years", "give shade"), ("walk", "talk")),
    "snakes": (("crawl", "swim"), ("walk", "hear as we do")), "elephants": (("carry heavy things", "swim", "remember for a long time"), ("jump", "fly")), "frogs": (("jump", "swim", "croak"), ("fly",)),
    "cows": (("give milk", "eat grass"), ("fly", "climb")), "people": (("think", "talk", "laugh", "learn"), ("fly without a machine", "breathe under water")), "robots": (("lift heavy things", "work without a break"), ("feel pain", "love")),
    "parrots": (("fly", "learn words"), ("read books",)), "spiders": (("climb walls", "spin webs"), ("fly",)), "turtles": (("swim", "live very long"), ("run fast",)), "computers": (("count very fast", "store pictures"), ("smell", "eat")),
}  # fmt: skip

RHYMES = ["cat hat bat mat rat", "dog fog log frog", "sun fun run bun", "moon spoon soon noon", "tree sea bee key free", "house mouse", "light night bright right", "day play say way may", "star car far jar", "rain train plain again", "book cook look hook", "king ring sing spring thing", "snow go slow low", "blue new you true", "bear hair chair pear", "lake cake snake make", "ball tall wall fall small", "heart part art start", "red bed head bread", "rose nose those goes"]  # fmt: skip

COUNTS = {
    "legs does a spider have": "A spider has eight legs.", "legs does a dog have": "A dog has four legs.", "legs does a bee have": "A bee has six legs.", "legs does a bird have": "A bird has two legs.",
    "legs does a snake have": "A snake has no legs.", "wheels does a bicycle have": "A bicycle has two wheels.", "wheels does a car have": "A car has four wheels.", "days are in a year": "A year has 365 days, and every fourth year one more.",
    "days are in a week": "A week has seven days.", "hours are in a day": "A day has 24 hours.", "minutes are in an hour": "An hour has 60 minutes.", "seconds are in a minute": "A minute has 60 seconds.",
    "months are in a year": "A year has twelve months.", "weeks are in a year": "A year has 52 weeks.", "fingers do I have": "You have ten fingers, five on each hand.", "eyes do people have": "People have two eyes.",
    "planets are there": "There are eight planets around our sun.", "letters are in the alphabet": "The English alphabet has 26 letters.", "sides does a triangle have": "A triangle has three sides.",
    "sides does a square have": "A square has four sides.", "colours are in a rainbow": "People often count seven colours in a rainbow.", "arms does an octopus have": "An octopus has eight arms.", "seasons are there": "There are four seasons.",
    "teeth does an adult have": "Most adults have 32 teeth.", "continents are there": "Most people count seven continents.", "hearts does an octopus have": "An octopus has three hearts.", "cents are in a dollar": "A dollar has 100 cents.",
}  # fmt: skip

BIGGEST = {
    "the largest animal": "The blue whale is the largest animal.", "the tallest animal": "The giraffe is the tallest animal.", "the fastest animal on land": "The cheetah is the fastest animal on land.",
    "the highest mountain": "Mount Everest is the highest mountain.", "the longest river": "The Nile is often called the longest river.", "the largest ocean": "The Pacific is the largest ocean.",
    "the largest planet": "Jupiter is the largest planet.", "the closest star": "The sun is the closest star.", "the coldest season": "Winter is the coldest season.", "the warmest season": "Summer is the warmest season.",
    "the first month of the year": "January is the first month of the year.", "the last month of the year": "December is the last month of the year.", "the shortest month": "February is the shortest month.",
    "the first day of the week": "Many people begin the week with Monday.", "the largest country": "Russia is the largest country.", "the largest desert": "The Sahara is the largest hot desert.", "the largest animal on land": "The elephant is the largest animal on land.",
}  # fmt: skip


def objects(rng: random.Random) -> Turns:
    """What things are for and where they are."""
    name = rng.choice(list(OBJECTS))
    use, place = OBJECTS[name]
    one = "[n]" if name in MANY or name == "paper" or name == "soap" else "a [n]"
    be = "are" if name in MANY else "is"
    values = {"n": name, "use": use, "place": place}
    return exchange(
        *rng.choice(
            (
                (f"{{What is {one} for|What do people use {one} for|What can I do with {one}|What do I need {one} for|Why do people have {one}|What's {one} good for}}?", f"{{You use {one}|People use {one}|{one} {be} there}} [use]."),
                (f"{{Where do I find {one}|Where can I find {one}|Where is {one} usually|Where should I look for {one}}}?", f"{{You often find {one} [place].|Look [place].|Usually [place].}}"),
                (f"{{What is {one}|Tell me what {one} is|Explain {one}}}?", f"{one} {be} something that you use [use]. {{You often find {'them' if name in MANY else 'it'} [place].|}}"),
                ("{What do I need [use]|What do people use [use]|What can I use [use]}?", f"{{You need {one}.|You can use {one}.|For that you need {one}.}}"),
                (f"{{I lost my [n]|I bought {one}|I need {one}|I am looking for my [n]|I broke my [n]}}.", "{Oh, I see.|I understand.|Ah!} {Have you looked [place]?|What do you want to do with it?|I hope that it goes well.|You need it [use].|Perhaps it is [place].}"),
            )
        ),
        rng,
        values,
    )  # fmt: skip


def jobs(rng: random.Random) -> Turns:
    """What people do at work; also the user's own job."""
    name = rng.choice(list(JOBS))
    values = {"n": name, "does": JOBS[name]}
    return exchange(
        *rng.choice(
            (
                ("{What does a [n] do|What is a [n]|What is the work of a [n]|Tell me what a [n] does|Explain what a [n] is}?", "A [n] [does]."),
                ("Who [does]?", "A [n] [does]."),
                ("{I am a [n]|I work as a [n]|I'm a [n]}.", "{That is a good job.|How interesting!|So you are a [n].} {A [n] [does].|Do you like your work?|What did you do today?|Is it hard work?}"),
                ("{I want to become a [n]|I would like to be a [n]|My dream is to be a [n]}.", "{That is a fine dream.|I like that.|Good for you!} {A [n] [does], so you will be useful to many.|Learn as much as you can.|Why do you want to be a [n]?}"),
                ("{My mother is a [n]|My father is a [n]|My sister is a [n]|My friend is a [n]|My brother is a [n]}.", "{How interesting!|That is a good job.} {A [n] [does].|Would you like to be a [n] too?|Is it hard work?}"),
            )
        ),
        rng,
        values,
    )  # fmt: skip


def places(rng: random.Random) -> Turns:
    """What one does at a place."""
    place = rng.choice(list(PLACES))
    values = {"place": place, "the": place.split(" ", 1)[1], "do": PLACES[place]}
    return exchange(
        *rng.choice(
            (
                ("{What can I do in [place]|What do people do in [place]|What is [place] for|Why do people go to [place]|What is there to do in [place]}?", "{In [place] you can|People go to [place] to} [do]."),
                ("{I am in [place]|I am going to [place]|Tomorrow I go to [place]|I want to go to [place]}.", "{That sounds nice.|How nice!|I like that.} {There you can [do].|What do you like about it?|Who is with you?|Enjoy your time there.}"),
                ("{I was in [place] yesterday|We went to [place]|Yesterday I was in [place]|I spent the day in [place]}.", "{That sounds nice.|How nice!|I like that.} {There you can [do].|What did you like about it?|Who was with you?|What did you see?|Was it a good day?}"),
                ("Where can I [do]?", "{You can do that in [place].|Go to [place].|In [place].}"),
            )
        ),
        rng,
        values,
    )  # fmt: skip


def abilities(rng: random.Random) -> Turns:
    """Can fish swim? Can cats fly?"""
    who = rng.choice(list(CAN))
    can, cannot = CAN[who]
    yes, no = rng.choice(can), rng.choice(cannot)
    values = {"who": who, "yes": yes, "no": no}
    return exchange(
        *rng.choice(
            (
                ("Can [who] [yes]?", "Yes, [who] can [yes]. {But they cannot [no].|}"),
                ("Can [who] [no]?", "No, [who] cannot [no]. {But they can [yes].|}"),
                ("{What can [who] do|What are [who] good at|Tell me what [who] can do}?", "[who] can [yes], but they cannot [no]."),
                ("What can [who] not do?", "[who] cannot [no]."),
            )
        ),
        rng,
        values,
    )  # fmt: skip


def rhyme(rng: random.Random) -> Turns:
    """Words that rhyme."""
    words = rng.choice(RHYMES).split()
    word, *others = rng.sample(words, len(words))
    return exchange(
        "{What rhymes with [w]|Which word rhymes with [w]|Tell me a word that rhymes with [w]|Give me a rhyme for [w]|Find a rhyme for [w]}?",
        f"{{[w] rhymes with|These rhyme with [w]:|Words that rhyme with [w] are}} {series(others[:3])}."
        if len(others) > 1
        else f"[w] rhymes with {others[0]}.",
        rng,
        {"w": word},
    )


def numbers(rng: random.Random) -> Turns:
    """How many, the largest of, which number is greater, what comes next."""
    draw = rng.random()
    if draw < 0.4:
        question, answer = rng.choice(list(COUNTS.items()))
        return exchange(f"{{How many {question}|How many {question}|Do you know: how many {question}}}?", answer, rng)
    if draw < 0.65:
        question, answer = rng.choice(list(BIGGEST.items()))
        return exchange(
            f"{{What is {question}|Which is {question}|What's {question}|Do you know {question}|Name {question}}}?",
            answer,
            rng,
        )
    if draw < 0.85:
        a, b = rng.sample(range(1, 100), 2)
        most, least = str(max(a, b)), str(min(a, b))
        values = {"a": str(a), "b": str(b), "most": most, "least": least}
        return exchange(*rng.choice((("{Which number is larger, [a] or [b]|What is more, [a] or [b]|Is [a] or [b] bigger|Which is greater, [a] or [b]}?", "{[most] is larger than [least].|[most] is more than [least].}"), ("{Which number is smaller, [a] or [b]|What is less, [a] or [b]}?", "{[least] is smaller than [most].|[least] is less than [most].}"))), rng, values)  # fmt: skip
    n = rng.randint(1, 60)
    return exchange(
        "{What comes after [n]|Which number comes after [n]|What number is next after [n]}?",
        "{After [n] comes [m].|It is [m].}",
        rng,
        {"n": str(n), "m": str(n + 1)},
    )
