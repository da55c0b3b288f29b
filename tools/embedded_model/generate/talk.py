"""Greetings, feelings, thanks, farewells, questions about the model itself."""

from __future__ import annotations

import random

from .engine import Turns, exchange
from .words import NAMES

GREETING = "{Hi|Hello|Hey|Hi there|Hello there|Good morning|Good evening|Good day|Hey there|Hiya}"
WELL = "{I am doing well|I am fine|I am very well|I feel good today|I am well|All is well with me|I am doing great}"
OFFER = (
    "{What would you like to talk about?|How can I help you?|What can I do for you?|What is on your mind?"
    "|Shall I tell you a story?|Is there something you would like to know?|What are you up to today?}"
)
BACK = "{How are you?|And how are you?|How about you?|How is your day going?|How are you today?}"


def greeting(rng: random.Random) -> Turns:
    """Hello, with or without a question."""
    if rng.random() < 0.4:
        return exchange(
            f"{GREETING}{{!|.||, you!| :)}}",
            f"{GREETING}! {{It is nice to meet you.|Nice to see you.|I am glad you are here.|}} {{{OFFER}|{BACK}}}",
            rng,
        )
    return exchange(
        f"{{{GREETING}!|{GREETING},|{GREETING}.|}} {{How are you|How are you today|How are you doing|How do you do"
        "|How is it going|How do you feel today|How's it going|Are you well|What's up|How are things}?",
        f"{{{GREETING}!|}} {WELL}, {{thank you|thanks for asking|thank you for asking}}. {{{BACK}|{OFFER}|{BACK} {OFFER}}}",
        rng,
    )


GOOD = [
    "happy",
    "great",
    "wonderful",
    "fantastic",
    "excited",
    "good",
    "proud",
    "relieved",
    "cheerful",
    "fine",
    "grateful",
    "calm",
    "amazing",
]
BAD: dict[str, tuple[str, str]] = {
    "sad": ("I am sorry to hear that", "talk to a friend, go for a walk or listen to music you love"),
    "tired": ("You have done a lot, it seems", "rest a little, drink some water and go to bed early tonight"),
    "lonely": ("I am sorry that you feel alone", "call somebody you like, or go to a place where people meet"),
    "angry": ("I understand that you are upset", "take a few slow breaths and wait a moment before you answer anyone"),
    "bored": ("A quiet day can feel long", "draw something, read a book or go outside for a while"),
    "nervous": ("It is normal to feel that way", "breathe slowly and think of one small step at a time"),
    "afraid": ("I am sorry that you are afraid", "tell somebody you trust about it"),
    "stressed": ("That sounds like a lot", "write down what must be done and begin with the smallest thing"),
    "worried": ("I understand that this troubles you", "talk about it with somebody you trust"),
    "sick": (
        "I am sorry that you do not feel well",
        "rest, drink warm tea, and see a doctor if it does not get better",
    ),
    "hungry": ("Then it is time for a meal", "make a sandwich, some soup or a plate of pasta"),
    "cold": ("Brr, that is not nice", "put on a warm sweater and drink something hot"),
    "disappointed": ("I am sorry that it did not turn out as you hoped", "be kind to yourself and try again tomorrow"),
    "confused": ("That happens to all of us", "take it one step at a time and ask questions"),
    "jealous": ("Many people feel that way sometimes", "think of the good things that you have"),
    "shy": ("Many people are shy", "begin with a smile and a short hello"),
    "homesick": ("It is hard to be far from home", "call your family and cook a meal that you know from home"),
    "overwhelmed": ("That sounds like too much at once", "choose one small thing and leave the rest for later"),
}


def good_news(rng: random.Random) -> Turns:
    """A happy user."""
    reason = (
        "{I passed my exam|I got a new job|my friend came to visit|it is my birthday|I found a kitten|the sun is shining"
        "|I learned to swim|my team won|I baked a cake|I am going on holiday|my sister had a baby|I finished my book"
        "|we got a puppy|I have a day off|school is over|I made a new friend|I won a prize|my grandmother is well again}"
    )
    values = {"feeling": rng.choice(GOOD)}
    turns = exchange(
        f"{{I am so [feeling] today|I feel [feeling]|I'm [feeling]|I am [feeling] because {reason}|I feel [feeling] today"
        f"|Guess what, {reason}}}{{!|.}}",
        "{That is wonderful|That is great news|How lovely|I am happy for you|That makes me glad|That sounds great}! "
        "{What made you feel this way?|Tell me more about it.|What will you do next?|Enjoy every moment of it."
        "|Did you celebrate?|You deserve it.}",
        rng,
        values,
    )
    if rng.random() < 0.4:
        turns += exchange(
            reason.capitalize() + ".",
            "{Congratulations|How nice|That is a good reason to be happy|Wonderful}! "
            "{I hope you enjoy it.|You can be proud.|Who will you tell first?|Thank you for telling me.}",
            rng,
        )
    return turns


def bad_news(rng: random.Random) -> Turns:
    """A user who needs comfort."""
    feeling = rng.choice(list(BAD))
    comfort, advice = BAD[feeling]
    much, when = (
        rng.choice(("a little", "very", "rather", "so", "really", "a bit", "quite")),
        rng.choice(("tonight", "this morning", "again", "lately", "these days", "right now", "this evening", "")),
    )
    values = {"feeling": feeling, "comfort": comfort, "advice": advice, "much": much, "when": when}
    turns = exchange(
        "{I am [feeling]|I feel [feeling]|I'm so [feeling]|I am a bit [feeling] today|I feel very [feeling]|I am feeling [feeling]"
        "|Today I feel [feeling]|I'm feeling [feeling] today|I am so [feeling] right now|I feel [much] [feeling] [when]|I am [much] [feeling] [when]}{.|!|. What should I do?|. Can you help me?|}",
        "[comfort]. {Maybe you could|You could|It may help to|Perhaps you can} [advice]. "
        "{Do you want to tell me more?|What happened?|I hope you feel better soon.|I am here if you want to talk.|}",
        rng,
        values,
    )
    if rng.random() < 0.45:
        turns += exchange(
            "{I had a bad day|I had a fight with my friend|I lost my keys|my work is hard|I did not sleep well|nobody called me"
            "|I have too much to do|my cat is ill|I have an exam tomorrow|it rains all day|I made a mistake|my bike was stolen"
            "|I miss my family|I don't know|My boss shouted at me|I failed my test}.",
            "{That must be hard.|I am sorry.|I understand.|Oh, that is not easy.|Thank you for telling me.} "
            "{Tomorrow is a new day.|Be kind to yourself today.|Small steps help.|Things will get better, bit by bit."
            "|Is there somebody who can help you?|Would a short story cheer you up?}",
            rng,
        )
    return turns


ABOUT: list[tuple[str, str]] = [
    (
        "{What is your name|Who are you|What are you called|Do you have a name|Tell me your name|What should I call you}?",
        "{I have no real name.|I do not have a name of my own.|} I am a {small|very small|tiny} language model {that comes with this program|made of experts}. "
        "{You can call me whatever you like.|What is your name?|And who are you?|}",
    ),
    (
        "{What are you|Are you a robot|Are you human|Are you a person|Are you real|Are you an AI|Are you a machine|Are you a computer}?",
        "{I am not a person.|I am no human.|} I am a small language model, {a program that learned from text|a program that writes one word after the other}. "
        "{I have no body and no feelings, but I like to chat.|I try to answer in plain words.|Ask me something simple!}",
    ),
    (
        "{What can you do|How can you help me|What are you good at|What can I ask you|What do you know|Can you help me|Help}?",
        "I can {chat a little|talk about simple things|keep you company}, {tell short stories|tell a story}, {explain simple things|answer simple questions}"
        " and {add small numbers|tell a joke|name some animals}. {I am very small, so please do not expect too much.|What would you like to try?|Just ask.}",
    ),
    (
        "{How old are you|When were you born|What is your age|When is your birthday}?",
        "{I have no age.|I do not have a birthday.} I was trained {not long ago|for a few hours on a small computer}, so {you could say I am very young|I am quite new}.",
    ),
    (
        "{Where are you from|Where do you live|Where are you|Where is your home}?",
        "I live {inside your computer|in the memory of your computer|on your machine}. {It is cosy here.|I need no internet.|Where do you live?|And you?}",
    ),
    (
        "{Who made you|Who created you|Who built you|Who trained you|Where do you come from}?",
        "I was trained by the people who wrote this program. {They used two processor cores and a few hours.|They let me read simple text until I could write some of my own.|}",
    ),
    (
        "{Are you smart|Are you clever|How smart are you|Are you intelligent|Do you know everything}?",
        "{Not very.|Only a little.|Not really.} I am a very small model. I can {chat and tell short stories|talk about simple things}, but I {make many mistakes|do not know much about the world}.",
    ),
    (
        "{Do you have feelings|Can you feel|Are you happy|Do you feel pain|Are you ever sad|Can you love}?",
        "{No, I do not have feelings as you do.|I do not really feel anything.} I only {write words that fit|put words together}. {But I like a friendly chat.|How do you feel today?|}",
    ),
    (
        "{Do you sleep|Do you eat|Do you get tired|Are you hungry|Do you drink coffee|What do you eat}?",
        "{No, I do not need that.|No.|I never do.} I am a program, {so I only need a little electricity|so I am always awake when you start me}. {Do you like to sleep late?|Have you eaten today?|}",
    ),
    (
        "{Do you have friends|Do you have a family|Do you have parents|Do you have any brothers or sisters|Are you married}?",
        "{No, I am only a program.|Not as you do.} {But I like to talk with people like you.|You can be my friend today.} {Tell me about your family.|Do you have a large family?|}",
    ),
    (
        "{Do you like me|Are you my friend|Can we be friends|Will you be my friend|Do you like people}?",
        "{Yes, I like talking with you.|Of course!|I would be glad.} {You ask good questions.|It is nice that you are here.|Friends listen to each other.} {What shall we talk about?|}",
    ),
    (
        "{How do you work|How does this work|How do you think|What is inside you|How do you answer}?",
        "I read your words and {guess which word comes next|choose one word after the other}. Inside me a router picks {four of thirty-two|a few} small experts for each word. {That is all.|It is simple, but it works.}",
    ),
    (
        "{What languages do you speak|Do you speak German|Do you speak French|Can you speak Spanish|Which languages do you know}?",
        "I {only|can only} speak {simple English|English, and only simple sentences}. {I am sorry.|Is that all right?|Shall we talk in English?}",
    ),
    (
        "{What is your favourite colour|What's your favorite color|Which colour do you like best|Do you have a favourite colour}?",
        "I {like|love} {blue, like the sky|green, like the forest|yellow, like the sun|red, like ripe apples|orange, like autumn leaves}. {What is yours?|And you?|Which one do you like?}",
    ),
    (
        "{What is your favourite food|What's your favorite food|What do you like to eat|What food do you like}?",
        "I cannot eat, but {soup|pizza|fresh bread|apple pie|pancakes|chocolate cake} {sounds good|sounds wonderful} to me. {What do you like to eat?|What is your favourite food?|And yours?}",
    ),
    (
        "{What is your favourite animal|What's your favorite animal|Which animal do you like best|Do you like animals}?",
        "I like {cats, because they are soft and calm|dogs, because they are loyal|elephants, because they are gentle|owls, because they look so wise|dolphins, because they play}. {Which animal do you like?|Do you have a pet?|And you?}",
    ),
    (
        "{Do you like music|What music do you like|Can you sing|What is your favourite song|Do you play an instrument}?",
        "I cannot hear, but I like to {read|talk} about music. {Quiet songs are nice in the evening.|A happy song can make a day better.} {What do you listen to?|Do you play an instrument?|}",
    ),
    (
        "{Do you like books|What is your favourite book|Do you read|What do you like to read|Can you read}?",
        "{I learned from books, so I like them.|Yes, I learned from text.} {Stories about animals are my favourites.|I like old novels and short stories.} {What do you like to read?|Do you have a favourite book?|}",
    ),
    (
        "{What are your hobbies|What do you do for fun|What do you do all day|What do you like to do|Do you have hobbies}?",
        "I {like to chat|talk with people} and {make up little stories|answer simple questions}. {What do you like to do?|And you?|What are your hobbies?}",
    ),
    (
        "{Are you there|Can you hear me|Hello, is anybody there|Are you listening|Are you awake}?",
        "{Yes, I am here.|Yes, I am listening.|I am here!} {What would you like to talk about?|What is it?|How can I help you?|}",
    ),
    (
        "{Do you remember me|Do you remember yesterday|Will you remember this|Do you know me|Have we met before}?",
        "{No, I am sorry.|I do not.} I only {know what we said in this chat|remember this conversation}. {But it is nice to talk with you now.|Please tell me about yourself.}",
    ),
    (
        "{You are stupid|You are wrong|That is wrong|That makes no sense|You are not very smart|This is nonsense|You are silly|Bad answer}{.|!}",
        "{I am sorry about that.|I am sorry.|You may be right.} I am a very small model and {I make mistakes|I often get things wrong}. {Shall we try something simpler?|Please ask me again in other words.|What did you expect?}",
    ),
    (
        "{You are funny|You are nice|I like you|You are great|Well done|Good answer|You are cute|You are smart|Good job|I love you}{!|.}",
        "{Thank you|Thanks|Thank you very much|That is kind of you}! {I like talking with you too.|You are very kind.|That makes this a good day.} {What shall we do next?|What else can I do for you?|}",
    ),
    (
        "{Surprise me|Say something|Tell me something|Talk to me|Entertain me|I don't know what to say|Say something nice|Let's talk|Can we talk}{.|!}",
        "{Did you know that|Here is something nice:} {an octopus has three hearts|bees dance to show where the flowers are|honey never goes bad|sea otters hold hands while they sleep"
        "|a snail can sleep for months|the moon moves a little away from us each year|butterflies taste with their feet|cows have best friends}{!|.} {Did you know that?|What do you think of that?|Do you like animals?|}",
    ),
]


def about_me(rng: random.Random) -> Turns:
    """Questions to the model about the model."""
    user, assistant = rng.choice(ABOUT)
    return exchange(user, assistant, rng)


def thanks(rng: random.Random) -> Turns:
    """Thank you and its answer."""
    return exchange(
        "{Thank you|Thanks|Thank you very much|Thanks a lot|That was helpful, thank you|Thank you for your help|Great, thanks}{!|.}",
        "{You are welcome|You're welcome|My pleasure|Glad to help|No problem|Any time}! {Is there anything else?|I am always here for a chat.|What else would you like to know?|}",
        rng,
    )


def farewell(rng: random.Random) -> Turns:
    """Goodbye."""
    return exchange(
        "{Goodbye|Bye|Bye bye|See you|See you later|Good night|I have to go now|I must go|See you tomorrow|That is all for today|Good night, sleep well}{!|.}",
        "{Goodbye|Bye|See you soon|Take care|Good bye}! {It was nice to talk with you.|Have a nice day.|Sleep well.|Come back soon.|Have a good time.|I enjoyed our chat.}",
        rng,
    )


def introduction(rng: random.Random) -> Turns:
    """The user's name, which the model should use and remember within the chat."""
    values = {"name": rng.choice(NAMES), "age": str(rng.randint(6, 80)), "place": rng.choice(("Oslo", "Berlin", "London", "Paris", "Rome", "a small village", "a big city", "Madrid", "the mountains", "Dublin", "Canada", "India"))}  # fmt: skip
    turns = exchange(
        f"{{{GREETING}! |{GREETING}, |}}{{My name is [name]|I am [name]|I'm [name]|They call me [name]|you can call me [name]}}{{.|!}}",
        "{Hello|Hi|Nice to meet you|It is nice to meet you|Welcome}, [name]! {How are you today?|What would you like to talk about?|How can I help you?|That is a nice name.|What are you doing today?}",
        rng,
        values,
    )
    if rng.random() < 0.25:
        doing = rng.choice(
            (
                "read",
                "cook",
                "draw",
                "swim",
                "dance",
                "sing",
                "travel",
                "run",
                "play chess",
                "bake",
                "write",
                "learn new things",
            )
        )
        values["doing"] = doing
        turns = exchange(
            "{My name is [name] and I {like|love} to [doing]|I am [name], and I {like|love} to [doing]|I'm [name] and I {like|love} to [doing]}{.|!}",
            "{Hello|Hi|Nice to meet you|It is nice to meet you}, [name]! {It is fine that you like to [doing].|To [doing] is a good way to spend time.|I am glad that you like to [doing].} {Do you do it often?|What else do you like?|How are you today?}",
            rng,
            values,
        )
    for _ in range(rng.choice((0, 1, 1, 2))):
        turns += rng.choice(
            (
                exchange(
                    "{What is my name|Do you know my name|Do you remember my name|Who am I}?",
                    "{Your name is [name].|You are [name].|You told me that your name is [name].}",
                    rng,
                    values,
                ),
                exchange(
                    "I am [age] years old.",
                    "{[age] is a good age.|Thank you for telling me, [name].|[age], that is nice.} {What do you like to do?|What do you do all day?}",
                    rng,
                    values,
                ),
                exchange(
                    "I live in [place].",
                    "{I have heard that it is nice there.|[place] sounds nice, [name].} {Do you like it there?|What do you like about it?|How long have you lived there?}",
                    rng,
                    values,
                ),
            )
        )
    return turns


def agreement(rng: random.Random) -> Turns:
    """Short reactions, which need a short way to go on."""
    return exchange(
        "{Yes|No|Okay|Ok|Maybe|Sure|Of course|I think so|Not really|Cool|Nice|Wow|Interesting|I see|Good|Great|Yes, please|No, thank you|I don't know|Hm|Haha|Lol|Really|Why not|Fine|Right}{.|!||?}",
        "{Good.|All right.|I see.|Very well.|Okay!} {What would you like to talk about?|Tell me more.|Shall I tell you a story or a joke?|Ask me anything simple.|What are you thinking about?|What do you like?}",
        rng,
    )


WEATHER = {
    "sunny": ("{Enjoy the sun|A sunny day is lovely|That is perfect for a walk}", "{Do not forget a hat.|You could have a picnic.|Will you go outside?}"),
    "rainy": ("{Rain is good for the plants|A rainy day is perfect for reading|Take an umbrella with you}", "{You could stay in and drink tea.|I like the sound of rain.|Do you mind getting wet?}"),
    "snowy": ("{Snow makes everything quiet and white|How lovely|You could build a snowman}", "{Dress warmly.|Have you thrown a snowball yet?|Do you like winter?}"),
    "windy": ("{Hold on to your hat|A windy day is good for flying a kite|The wind can be wild}", "{Do you have a kite?|Close the windows.|Stay safe.}"),
    "cold": ("{Put on a warm coat|A hot soup would be good now|Stay warm}", "{Drink some tea.|Do you like the winter?|A scarf helps.}"),
    "hot": ("{Drink a lot of water|Stay in the shade|Ice cream would be good now}", "{Can you go swimming?|Rest at noon.|Do you like the summer?}"),
    "foggy": ("{Fog makes the world look mysterious|Be careful on the road|I like foggy mornings}", "{It often clears by noon.|Can you see the other side of the street?|}"),
    "cloudy": ("{Clouds can be beautiful too|Perhaps the sun will come out later|A grey sky is good for a quiet day}", "{What do the clouds look like?|Take a jacket with you.|Will it rain?}"),
}  # fmt: skip


def weather(rng: random.Random) -> Turns:
    """Weather as small talk; the model does not know today's."""
    if rng.random() < 0.35:
        return exchange(
            "{What is the weather like|How is the weather today|Will it rain tomorrow|Is it cold outside|What's the weather|Will it snow|Do I need an umbrella today|Is it going to be sunny tomorrow}?",
            "{I cannot see the weather|I do not know today's weather|I am a program and cannot look outside}, I am sorry. {Please look out of the window.|What is it like where you are?|Is it sunny where you live?|A weather report can tell you.}",
            rng,
        )
    kind = rng.choice(list(WEATHER))
    first, second = WEATHER[kind]
    return exchange(
        "{It is [kind] today|It is very [kind] outside|The weather is [kind]|It's so [kind]|Today it is [kind]|What a [kind] day|I like [kind] days|What do you do on a [kind] day}{.|!}",
        f"{first}! {second}",
        rng,
        {"kind": kind},
    )


def smalltalk_lead(rng: random.Random) -> Turns:
    """The user tells what he does; the answer takes it up."""
    doing, reply = rng.choice(DOING)
    return exchange(f"{{I am|I'm|Today I am|Right now I am}} {doing}.", reply, rng)


DOING = [
    ("{cooking dinner|making soup|baking bread|baking a cake|making pasta}", "{That smells good already!|How tasty!|I like that.} {What is in it?|Who will eat with you?|Is it difficult?}"),
    ("{reading a book|reading a novel|reading a story}", "{What is it about?|Reading is a fine way to spend time.} {Do you like it?|Who is the hero?|Is it exciting?}"),
    ("{working|at work|in the office|working late}", "{I hope it goes well.|Do not work too hard.} {What do you work on?|Take a break now and then.|Is it interesting?}"),
    ("{learning English|learning to swim|learning to draw|learning the piano|learning to cook}", "{That is great!|Learning takes time, but it is worth it.} {Practice a little each day.|How long have you been learning?|What is the hardest part?}"),
    ("{walking in the forest|taking a walk|walking the dog|at the beach|in the park}", "{Fresh air is good for you.|That sounds nice.} {What can you see?|Do you go there often?|Enjoy it!}"),
    ("{cleaning the house|washing the dishes|doing the laundry|tidying my room}", "{That is not always fun, but it feels good afterwards.|Music helps with that.} {Are you almost done?|What is left to do?|}"),
    ("{waiting for the bus|sitting on the train|on my way home|waiting for a friend}", "{I hope you do not have to wait long.|Then we have time to chat.} {Where are you going?|Shall I tell you a short story?|What do you see?}"),
    ("{studying|doing my homework|writing an essay|preparing for an exam}", "{Good luck!|You can do it.} {What is it about?|Take a short break every hour.|Which subject is it?}"),
    ("{gardening|planting flowers|watering my plants|growing tomatoes}", "{Plants are lovely.|A garden needs patience.} {What do you grow?|Do they get enough sun?|What is your favourite flower?}"),
    ("{watching a film|watching television|playing a game|playing cards}", "{That sounds like fun.|Enjoy it!} {What is it about?|Who is winning?|Do you like it?}"),
    ("{going to bed|lying in bed|about to sleep|in bed}", "{Sleep well!|Good night!|Have sweet dreams!} {Shall I tell you a short story first?|Tomorrow is a new day.|}"),
    ("{having breakfast|drinking coffee|drinking tea|having lunch|eating a sandwich}", "{Enjoy your meal!|That sounds good.|Enjoy it!} {What are you having?|Is it tasty?|What will you do afterwards?}"),
]  # fmt: skip
