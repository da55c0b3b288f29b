"""Small stories: a hero, a wish or a trouble, somebody who helps, and an end."""

from __future__ import annotations

import random

from .engine import Turns, exchange, expand
from .words import NAMES_HE, NAMES_SHE

# hero: places where it may live
BEASTS: dict[str, tuple[str, ...]] = {
    "cat": ("a small house", "a quiet street", "an old barn"), "dog": ("a little village", "a farm", "a house with a red door"),
    "mouse": ("a hole under the kitchen", "a barn", "a field of wheat"), "rabbit": ("a green meadow", "a forest", "a hole under an old oak"),
    "fox": ("a deep forest", "a den under a hill"), "bear": ("a cave in the mountains", "a dark forest"), "owl": ("a hollow tree", "an old tower"),
    "duck": ("a pond", "a quiet lake"), "frog": ("a pond behind the mill", "a green pond"), "turtle": ("a beach by the sea", "a slow river"),
    "squirrel": ("a tall oak", "a park in the city"), "hedgehog": ("a garden", "a heap of leaves"), "elephant": ("a wide plain", "a warm forest"),
    "lion": ("a golden plain", "a rocky hill"), "monkey": ("a warm forest", "a tall fig tree"), "penguin": ("an island of ice", "a cold coast"),
    "bird": ("a nest in an apple tree", "a garden by the river"), "horse": ("a farm on a hill", "a green valley"), "pig": ("a farm", "a muddy yard"),
    "sheep": ("a hill", "a green meadow"), "goat": ("the high mountains", "a farm"), "bee": ("a hive in a garden", "a field of flowers"),
    "dragon": ("a cave behind a waterfall", "a castle in ruins"), "robot": ("a workshop", "a house at the edge of the city"),
}  # fmt: skip
PEOPLE: dict[str, tuple[str, ...]] = {
    "girl": ("a small town", "a house by the sea", "a village in the mountains"), "boy": ("a small town", "a farm", "a house near the forest"),
    "king": ("a large castle", "a castle on a hill"), "queen": ("a white castle", "a palace by the lake"), "princess": ("a tall tower", "a castle by the sea"),
    "prince": ("a castle on a hill", "a far country"), "farmer": ("a farm", "a valley"), "baker": ("a small town", "a narrow street"),
    "fisherman": ("a hut by the sea", "a village on the coast"), "knight": ("an old castle", "a far country"), "wizard": ("a high tower", "a hut in the forest"),
    "old woman": ("a cottage in the forest", "a house with a garden"), "old man": ("a house by the river", "a hut on a hill"), "teacher": ("a small village", "a busy city"),
    "painter": ("a room under the roof", "a city by the river"), "sailor": ("a harbour town", "a boat"),
}  # fmt: skip
FEMALE = {"girl", "queen", "princess", "old woman", "bee", "duck", "cat", "bird", "sheep", "teacher", "painter"}
TRAITS = [
    "little",
    "young",
    "small",
    "kind",
    "shy",
    "brave",
    "curious",
    "clever",
    "gentle",
    "cheerful",
    "lonely",
    "sleepy",
    "hungry",
    "quiet",
]
HELPERS = ["owl", "mouse", "fox", "rabbit", "turtle", "squirrel", "bird", "frog", "bee", "hedgehog", "butterfly"]
THINGS = ["red ball", "golden key", "blue kite", "warm scarf", "small boat", "shiny stone", "wooden flute", "old map", "silver bell", "green hat", "little lantern", "music box", "yellow umbrella", "lost letter", "soft blanket"]  # fmt: skip
FOOD = ["a basket of apples", "some fresh bread", "a pot of honey", "a big cake", "sweet berries", "warm soup", "a bag of nuts", "a piece of cheese"]  # fmt: skip
FRIEND_TALK = '"{Why are you so sad|What is wrong|Can I help you|Why do you look so sad}?" {asked|said} the [helper].'

OPEN = (
    "{Once upon a time|Once|Long ago|One day|A long time ago|There was once a time when}{,|} there {was|lived} a [trait] [hero] {named|called} [name] {who lived in|in} [home]."
    "|In [home] {there lived|lived} a [trait] [hero] {named|called} [name]."
    "|[name] was a [trait] [hero] {who lived|that lived} in [home]."
)  # fmt: skip
CLOSE = (
    "{From that day on|Since then|After that}, [name] and the [helper] were {best friends|good friends|always together}."
    "|{That night|In the evening} [name] {fell asleep with a smile|slept well and had sweet dreams|was tired but happy}."
    "|And they all lived happily {ever after|together}."
    "|[name] never forgot that {day|kindness}."
    "|And [name] learned that {a friend is worth more than gold|it is good to ask for help|even small ones can do great things|sharing makes everything better|it is never too late to try|patience helps more than force|one must not give up|the best things are shared}."
)  # fmt: skip

PLOTS: dict[str, tuple[str, ...]] = {
    "lost": (
        "{One morning|One day}, [name] {lost|could not find} [his] [thing]. [He] looked {under the bed|behind the house|everywhere|in the grass}, but {it was not there|the [thing] was gone}.",
        "[name] {sat down and cried|was very sad|did not know what to do}.",
        "Then {a|an old|a friendly} [helper] came {by|along}. " + FRIEND_TALK,
        '"I have lost my [thing]," said [name].',
        "{They looked together|The [helper] helped [him] to look|Together they looked in every corner}, and at last they found it {near the river|under a bush|behind a big tree|on top of a hill|in a nest}.",
        '"{Thank you|Thank you so much}!" said [name] {and was happy again|and laughed|with a big smile}.',
    ),
    "share": (
        "{One day|One cold morning}, [name] had [food]. [He] wanted to {eat it all alone|keep everything}.",
        "Then a hungry [helper] came {to the door|along the path|out of the bushes}. \"{May I have a little|I am so hungry|Could you give me some}{?|, please?}\" {asked|said} the [helper].",
        "[name] {thought for a while|looked at [his] food|did not know what to do}. Then [he] smiled and {gave half of it to|shared it with} the [helper].",
        "{They ate together|They sat in the sun and ate}, and it {tasted better than ever|was the best meal of the year}.",
        "{In winter|Some days later}, when [name] {had nothing to eat|was hungry}, the [helper] came back {with a full basket|and brought food}.",
    ),
    "afraid": (
        "[name] was afraid of {the dark|the big river|high places|the deep forest|thunder|loud noises}. {Everybody laughed at [him]|[He] did not like to talk about it|[He] always stayed at home}.",
        "{One night|One evening}, [he] heard {a small voice|somebody call for help}. It was a {little|young} [helper] who {had fallen into a hole|could not find the way home|was stuck in the mud|sat alone on a branch}.",
        "[name] {took a deep breath|was afraid, but [he] went on|forgot [his] fear} and {went out into the night|ran to help|walked on, step by step}.",
        "{[He] helped the [helper]|[He] brought the [helper] home|[He] pulled the [helper] out}, and suddenly {[he] was not afraid any more|the world did not look so bad}.",
        '"You are very brave," said the [helper].',
    ),
    "wish": (
        "[name] had {only one wish|a great dream}: [he] wanted to {see the sea|fly like a bird|touch the moon|learn to sing|find a friend|see the snow|dance|climb the highest mountain}.",
        "{So one day|Early one morning} [he] {packed a small bag|said goodbye|took [his] [thing]} and {went out into the world|set off|began to walk}.",
        "On the way [he] met {a wise|an old|a funny} [helper]. \"{Where are you going|What are you looking for}?\" asked the [helper].",
        "[name] told {the [helper] everything|about [his] dream}. \"{Come with me|I know the way|I will help you}!\" said the [helper].",
        "They {walked for three days|crossed a river and a hill|went through the forest}, and then {the dream came true|they were there|[name] could not believe [his] eyes}.",
        "[name] {laughed and danced|was so happy that [he] cried|felt that everything was possible}.",
    ),
    "storm": (
        "{One night|One day} a great storm came. {The wind blew and the rain fell|The trees bent and the rain would not stop}, and {the house|the home} of [name] {was broken|was full of water|lost its roof}.",
        "{[name] was wet and cold|[name] had no place to sleep}. [He] {knocked at many doors|asked everybody}, but {nobody had room|nobody opened}.",
        'Only the [helper] {said|called}: "{Come in|You can stay with me|My house is small, but there is room for two}!"',
        "{They drank hot tea|They sat by the fire} and {told stories|waited until the storm was over}.",
        "{The next day|When the sun came back}, {all the neighbours came to help|they built a new house together}, and it was {stronger|more beautiful} than before.",
    ),
    "contest": (
        "{One day|In spring} there was a {race|contest} in {the village|the forest}. {Everybody thought that [name] would lose|Nobody thought that [name] could win}, because [he] was so {small|slow|young}.",
        '"{You will never win|Go home}!" {laughed|said} the [helper], {who was very fast|who was proud}.',
        "But [name] {did not listen|only smiled}. [He] {practised every day|went on, step by step|never stopped}.",
        "The [helper] {ran so fast that it fell|stopped to rest and fell asleep|looked back and lost the way}, and [name] {was first|came first|won}.",
        "\"{I am sorry|You were better than I}\", said the [helper]. [name] {gave the [helper] a hug|shared the prize|was not proud}, and they {laughed|ate cake together}.",
    ),
    "find": (
        "{One day|One sunny morning}, [name] found a [thing] {in the grass|by the river|under a tree|on the road}. {It was beautiful|It shone in the sun}.",
        "[name] wanted to keep it. But then [he] {heard somebody cry|met a sad [helper]|thought of the one who had lost it}.",
        'It was the [helper]. "{I have lost my [thing]|It was a gift from my mother}," {said|cried} the [helper].',
        "[name] {was sad for a moment|looked at the [thing] once more}, but {then [he] gave it back|[he] knew what was right}.",
        "The [helper] was so {happy|thankful} that {it invited [him] to a great meal|it gave [him] [food]|it sang a song for [him]}.",
    ),
    "garden": (
        "{In spring|One day} [name] planted a {small seed|tiny seed}. [He] watered it every day, but {nothing happened|nothing grew}.",
        '"{Give up|It will never grow}," said the neighbours. But the [helper] said: "{Be patient|Wait a little longer}."',
        "[name] waited. {It rained and the sun shone|Days and weeks went by}. Then, one morning, {a green leaf came out of the ground|there was a little leaf}.",
        "{It grew and grew|It became taller every day}, until it was {a tall sunflower|a tree full of apples|the most beautiful flower of all}.",
        "[name] {invited everybody|called all [his] friends}, and they {sat in its shade|had a feast}.",
    ),
    "night": (
        "Every evening [name] {looked at the stars|looked up at the moon}. \"{I wonder who lives there|How beautiful they are},\" [he] said.",
        "{One night|One clear night}, {a small star fell from the sky|a little light came down} and landed {in the garden|in the grass}. It was {sad and cold|afraid}, because it {wanted to go home|was all alone}.",
        "[name] {wrapped it in a blanket|held it in [his] arms|carried it carefully}. Then [he] asked the [helper] {for help|what to do}.",
        "{Together they climbed the highest hill|The [helper] knew a high mountain}, and there they {let the star go|threw the star into the air}.",
        "{It rose and rose|It flew back} until it shone {brighter than all the others|high above them}.",
    ),
    "cake": (
        "{It was the birthday of [name]|[name] had a birthday}, but {nobody seemed to remember|the house was quiet}. [He] felt {sad and alone|a little sad}.",
        "[He] went for a walk {in the forest|along the river}. There [he] met the [helper], who {only smiled|said nothing|had no time}.",
        "When [name] came home, {all the windows were dark|it was very quiet}. [He] opened the door.",
        '"{Surprise|Happy birthday}!" {shouted all [his] friends|everybody called}. There were {candles|balloons}, music and {a big cake|a cake with berries}.',
        "[name] {laughed and laughed|was the happiest [hero] in the world}. They {danced until midnight|ate cake and sang}.",
    ),
}  # fmt: skip


def tell(rng: random.Random, hero: str | None = None) -> tuple[str, dict[str, str]]:
    """A story of five to nine sentences, and the values in it."""
    hero = hero or rng.choice([*BEASTS, *BEASTS, *PEOPLE])
    homes = (BEASTS.get(hero) or PEOPLE.get(hero))  # fmt: skip
    she = hero in FEMALE or (hero not in PEOPLE and rng.random() < 0.35)
    helper = rng.choice([h for h in HELPERS if h != hero])
    values = {
        "hero": hero, "home": rng.choice(homes or ("a small house",)), "trait": rng.choice(TRAITS), "name": rng.choice(NAMES_SHE if she else NAMES_HE),
        "he": "she" if she else "he", "his": "her" if she else "his", "him": "her" if she else "him", "helper": helper,
        "thing": rng.choice(THINGS), "food": rng.choice(FOOD),
    }  # fmt: skip
    values["He"] = values["he"]
    plot = PLOTS[rng.choice(list(PLOTS))]
    parts = [rng.choice(OPEN.split(".|")).rstrip(".") + ".", *plot, rng.choice(CLOSE.split(".|")).rstrip(".") + "."]
    return " ".join(expand(part, rng, values) for part in parts), values


ASK = "{Tell me a story|Can you tell me a story|Tell me a short story|I would like to hear a story|Please tell me a story|Write a story|Write a short story|Once upon a time|Tell me a bedtime story|Do you know a story|Make up a story|A story, please|I want a story|Tell me another story}"
ASK_HERO = "{Tell me a story about a [x]|Can you tell me a story about a [x]|Write a story about a [x]|Write a short story about a [x]|I would like a story about a [x]|Do you know a story about a [x]|A story about a [x], please|Make up a story about a [y] [x]|Tell me a bedtime story about a [x]|Tell me about a [x] who was [y]}"


def story(rng: random.Random) -> Turns:
    """A story on request; often with a question about it afterwards, answered from what was told."""
    text, values = tell(rng)
    if rng.random() < 0.7:
        turns = exchange(ASK_HERO + "{.|!|?|}", "x", rng, {"x": values["hero"], "y": values["trait"]})
    else:
        turns = exchange(ASK + "{.|!|?|}", "x", rng)
    turns[1][1] = text
    if rng.random() < 0.35:
        for user, assistant in rng.sample(FOLLOW, rng.choice((1, 1, 2))):
            turns += exchange(user, assistant, rng, values)
    return turns


FOLLOW = [
    (
        "{What was the name of the [hero]|What is the [hero] called|Who was it about|What was the hero's name}?",
        "{The [hero] is called [name].|[his] name is [name].|It was [name], the [hero].}",
    ),
    ("{Where did [name] live|Where did the [hero] live}?", "{[name] lived in [home].|In [home].}"),
    (
        "{That was nice|I liked that|What a nice story|Beautiful|I like [name]|Lovely|Thank you for the story}{.|!}",
        "{Thank you!|I am glad that you liked it.|[name] would be happy to hear that.} {Shall I tell you another one?|Do you want to hear one more?|}",
    ),
    (
        "{Why was [name] happy|Was [name] happy at the end|How did it end}?",
        "{[name] was happy because of [his] friend, the [helper].|It ended well: [name] was happy.|Yes, it had a happy end.}",
    ),
    (
        "{Who helped [name]|Who was the friend of [name]|Who else was in the story}?",
        "{It was the [helper].|The [helper] was there too.|[name] met the [helper].}",
    ),
]


def told(rng: random.Random) -> str:
    """A story as plain text, without a question."""
    return tell(rng)[0]
