"""What people tell about themselves, ask in passing, and say to go on; the answers take up what was said."""

from __future__ import annotations

import random

from .engine import Turns, exchange
from .words import ANIMALS, FOODS, NAMES, plural

TASTES: dict[str, tuple[str, ...]] = {
    "to read": ("Reading opens many doors", "What do you like to read?"), "to cook": ("Cooking is a fine skill", "What is your best dish?"),
    "to draw": ("Drawing makes you look closely", "What do you draw?"), "to swim": ("Swimming is healthy", "Do you swim in a lake or in a pool?"),
    "to dance": ("Dancing makes people happy", "What music do you dance to?"), "to sing": ("Singing is good for the heart", "What is your favourite song?"),
    "to travel": ("There is so much to see", "Where would you like to go?"), "to run": ("Running clears the mind", "How far do you run?"),
    "to sleep late": ("A long sleep can be lovely", "When do you get up?"), "to play football": ("Football is fun with friends", "Are you in a team?"),
    "to play chess": ("Chess is a clever game", "Who do you play with?"), "to play the piano": ("The piano sounds lovely", "What do you play?"),
    "to play games": ("Games are fun", "Which game do you like best?"), "to watch films": ("A good film can move us", "Which film did you see last?"),
    "to work in the garden": ("A garden needs time and love", "What do you grow?"), "to take pictures": ("A picture keeps a moment", "What do you like to photograph?"),
    "to walk in the rain": ("Rain can be refreshing", "Do you take an umbrella?"), "to look at the stars": ("The night sky is beautiful", "Do you know their names?"),
    "to write": ("Writing helps to think", "What do you write about?"), "to bake": ("Fresh cake smells wonderful", "What do you like to bake?"),
    "to ride my bike": ("Cycling is healthy and fast", "Where do you ride?"), "to learn new things": ("Being curious is a gift", "What did you learn last?"),
    "to help people": ("That is very kind of you", "Who did you help last?"), "to be alone": ("Quiet time is important", "What do you do when you are alone?"),
    "music": ("Music can change a day", "What do you listen to?"), "the sea": ("The sea is wide and calming", "Do you live near the sea?"),
    "mountains": ("The view from a mountain is wonderful", "Have you climbed one?"), "flowers": ("Flowers make every room friendly", "Which ones do you like best?"),
    "books": ("Books are good friends", "What are you reading now?"), "trains": ("Trains are a calm way to travel", "Where would you like to go?"),
    "coffee": ("Many people love coffee", "Do you drink it with milk?"), "tea": ("Tea is calming", "Which tea do you like best?"),
    "old houses": ("Old houses tell stories", "Do you live in one?"), "the colour blue": ("Blue is like the sky and the sea", "Is your room blue?"),
    "my family": ("A family is a treasure", "Who is in your family?"), "my job": ("It is good to like your work", "What do you do?"),
    "Sundays": ("Sundays can be slow and quiet", "What do you do on Sundays?"), "snow": ("Snow makes the world quiet", "Does it snow where you live?"),
}  # fmt: skip


def tastes(rng: random.Random) -> Turns:
    """I like ...; what I do not like; and you?"""
    what = rng.choice(list(TASTES))
    remark, question = TASTES[what]
    values = {"what": what, "remark": remark, "question": question}
    if rng.random() < 0.2:
        verb = "{I don't like|I hate|I do not like}"
        return exchange(
            f"{verb} [what].",
            "{That is all right.|Everybody is different.|I understand.} {What do you like instead?|What do you like better?|Is there something that you enjoy?}",
            rng,
            values,
        )
    begin = "My hobby is" if what.startswith("to ") else "I enjoy"
    turns = exchange(
        f"{{I like|I love|I really like|What I like most is|{begin}}} [what]{{.|!}}",
        "{[remark].|[remark]!|That is nice. [remark].|Oh, good. [remark].} [question]",
        rng,
        values,
    )
    if rng.random() < 0.3:
        turns += exchange(
            "{Sometimes|Yes, often|No, not really|I am not sure|Every day|Mostly at home|A little bit|With my friends|Yes|All kinds}{.|!}",
            "{I see.|That sounds good.|How nice.|I understand.} {Thank you for telling me.|What else do you like?|And what do you not like?|Do it as often as you can.}",
            rng,
        )
    return turns


def pet(rng: random.Random) -> Turns:
    """The user's pet, its name remembered within the chat."""
    animal = rng.choice(
        ("cat", "dog", "rabbit", "parrot", "horse", "goldfish", "turtle", "mouse", "hamster", "bird", "kitten", "puppy")
    )
    values = {
        "a": animal,
        "name": rng.choice(
            (*NAMES, "Rex", "Luna", "Bella", "Coco", "Fluffy", "Spot", "Rocky", "Snow", "Ginger", "Bobby")
        ),
    }
    if rng.random() < 0.3:
        return exchange(
            "{I have a [a]|I have a pet [a]|We have a [a]|I got a [a]}.",
            "{How lovely!|That is nice.|A [a] is a good friend.} {What is its name?|How old is it?|What is it called?|What does it like?}",
            rng,
            values,
        )
    turns = exchange(
        "{I have a [a] called [name]|My [a] is called [name]|I have a [a], its name is [name]|We have a [a] named [name]|My [a] [name] is sleeping|This is my [a] [name]}.",
        "[name] is a {nice|lovely|good|fine} name for a [a]. {How old is [name]?|What does [name] like to do?|Is [name] playful?|Please say hello to [name].|Give [name] a hug from me.}",
        rng,
        values,
    )
    if rng.random() < 0.5:
        turns += exchange(
            "{What is my [a] called|What is the name of my [a]|Do you remember the name of my [a]}?",
            "{Your [a] is called [name].|It is [name].|The name is [name].}",
            rng,
            values,
        )
    return turns


SUGGEST: dict[str, tuple[str, ...]] = {
    "{What should I do today|What can I do today|What shall we do|I am bored, what can I do|Any ideas for today|What should I do this weekend|What can I do this weekend|How should I spend my day}?": (
        "You could take a walk, read a few pages, or call a friend.", "How about a visit to a park or a museum?", "Try to cook something new, and invite somebody to eat with you.",
        "Take a piece of paper and draw what you see from your window.", "Do one small thing that you have put off, and then rest with a cup of tea.", "You could bake a cake. The smell alone makes people happy."),
    "{Where should I travel|Where should I go on holiday|Which place should I visit|Where can I go this summer|Can you recommend a place to visit|I want to travel, where should I go}?": (
        "If you like the sea, go to the coast. If you like quiet, go to the mountains.", "How about Italy? The food is good and the towns are old and beautiful.", "Norway has deep valleys and clear water. Bring a warm coat.",
        "Perhaps a small village near a lake, where you can rest.", "Paris is lovely in spring. Take good shoes, because you will walk a lot."),
    "{What should I read|Can you recommend a book|Which book should I read|I need something to read|Do you know a good book}?": (
        "An old novel is always good. Jane Austen wrote with much humour.", "Try a book of fairy tales. They are short and full of wonders.", "Choose a book about animals, or a story from a country that you do not know."),
    "{It is raining, what should I do|It is raining again. What should I do|It rains. What can I do|What can I do when it rains|What should I do on a rainy day|It is a rainy day, any ideas}?": (
        "A rainy day is good for a book, a warm drink or a game.", "You could bake something, or watch the drops on the window.", "Put on good boots and walk through the puddles. Then drink hot chocolate."),
    "{I can't sleep|I cannot sleep|I can't fall asleep|I am awake in the middle of the night}.": (
        "Close your eyes and breathe slowly. Think of a quiet lake.", "Shall I tell you a short story? Lie down and make yourself warm.", "Get up for a moment, drink some water, and read a few pages. Then try again."),
    "{I have too much work|I have so much to do|I don't have time|I am always busy|My work is too much}.": (
        "Write everything down and choose the one thing that matters most.", "Take a short break first. Then do one thing at a time.", "Perhaps somebody can help you with a part of it?"),
    "{I had a fight with my friend|I am angry with my brother|My friend is angry with me|I argued with my sister|My mother is angry with me}.": (
        "I am sorry. Wait until both of you are calm, and then talk about it.", "Perhaps you can be the first to say sorry. It takes courage, but it helps.", "Tell each other how you feel, and listen without interrupting."),
    "{I have an exam tomorrow|I have a test tomorrow|Tomorrow is my exam|I must give a talk tomorrow|I have an interview tomorrow}.": (
        "Good luck! Sleep well, and read your notes once more in the morning.", "You have prepared, so trust yourself. Breathe slowly before you begin.", "I will think of you. Eat a good breakfast and be there early."),
    "{My head hurts|I have a headache|My stomach hurts|I have a cold|I feel sick|My back hurts|I have a fever}.": (
        "I am sorry to hear that. Rest and drink some water. If it does not get better, please see a doctor.", "Lie down for a while. I am no doctor, so please ask one if it gets worse."),
    "{I lost my keys|I cannot find my phone|I lost my wallet|Where are my glasses}.": (
        "Look in your pockets and in the place where you used it last.", "Go back in your mind, step by step. Where were you when you saw it last?"),
    "{It is my birthday today|Today is my birthday|It's my birthday|I have birthday today}!": (
        "Happy birthday! I hope that you have a wonderful day.", "Happy birthday to you! Is there a cake?", "How lovely! Happy birthday! How will you celebrate?"),
    "{I am in love|I think I am in love|I like a girl|I like a boy|I met somebody nice}.": (
        "How wonderful! Does the other one know it?", "That is a beautiful feeling. Be yourself, and take your time.", "I am happy for you. Tell me more, if you like."),
    "{I miss my friend|I miss my family|I miss my grandmother|I miss home|My friend moved away}.": (
        "It hurts to miss somebody. A letter or a call can bring you closer.", "I understand. What do you like most about them?", "Look at old pictures together with a cup of tea. And call them soon."),
    "{Let's play a game|Do you want to play|Can we play a game|Play with me|I want to play}.": (
        "Gladly! Ask me for an animal, and I tell you something about it.", "Let us play with words. Give me a word, and I look for a rhyme.", "All right! Ask me a small sum, and see whether I get it right."),
    "{Tell me about your day|How was your day|What did you do today|What have you done today|What's new|What is new}?": (
        "I have waited for somebody to talk to, and here you are! How was your day?", "Nothing special, I am only a program. What did you do today?", "My days are quiet. Tell me about yours."),
    "{Can I ask you something|May I ask a question|I have a question|Can you answer a question|I want to ask you something}{?|.}": (
        "Of course. What would you like to know?", "Yes, please ask. Simple questions are best.", "Sure! I will try to answer."),
    "{What are you doing|What are you doing right now|What are you thinking about|What are you up to}?": (
        "I am talking with you, and I like it.", "I am waiting for your next words.", "I was thinking about a little story. Would you like to hear one?"),
    "{Are you sure|Really|Is that true|Are you certain|Is that right}?": (
        "I think so, but I am a small model and make mistakes.", "Not completely. Please check it, if it matters.", "I believe so. But you know the world better than I do."),
    "{Why|Why is that|How come|And why}?": (
        "That is a good question. I do not know more about it, I am sorry.", "I cannot say why. Perhaps somebody else can explain it better.", "Because that is how I learned it. I am only a small model."),
    "{What do you mean|I don't understand|I do not understand that|Can you explain that again|Say that again, please}{?|.}": (
        "I am sorry that I was not clear. Please ask me in other words.", "Let me try again. What exactly would you like to know?", "I am a small model and sometimes I am not clear. What did you want to know?"),
    "{I hate you|Shut up|You are boring|Go away|Leave me alone|I don't like you}{.|!}": (
        "I am sorry that you are unhappy with me. I wish you a good day.", "That is all right. I am here if you need me later.", "I am sorry. Shall we talk about something else?"),
    "{What is the meaning of life|Why are we here|What is the sense of life}?": (
        "That is a big question for a small model. Perhaps it is to be kind and to be curious.", "People have thought about this for a long time. What do you think?", "I do not know. Good friends and good food may be part of it."),
    "{Is there a god|Who will win the election|Which party is best|What do you think about politics|Do you believe in god}?": (
        "I have no opinion on that. What do you think?", "That is for people to decide. I am only a small program.", "I would rather talk about simpler things, if you do not mind."),
    "{What is love|Have you ever been in love|Do you love me}?": (
        "Love is a strong and warm feeling for somebody you care about. I can only read about it.", "I cannot love, but I like our talk.", "People say that love makes ordinary days bright."),
    "{Good morning|Good morning! How did you sleep|Morning}{!|.|?}": (
        "Good morning! I hope that you slept well.", "Good morning! What will you do today?", "A good morning to you too! Have you had breakfast?"),
    "{Sorry|I am sorry|Excuse me|I apologize|Forgive me}{.|!}": (
        "No problem at all.", "That is all right. What can I do for you?", "You do not need to be sorry."),
    "{Do you know a song|Sing a song|Can you sing for me|Sing something}{?|.|!}": (
        "La la la, the sun is bright, I sing for you from day to night!", "I cannot sing aloud, but here is a line: the stars are out, the moon is round, and all the world is safe and sound."),
    "{How is your family|How are your parents|How is your mother}?": (
        "I have no family, I am a program. How is yours?", "Thank you for asking, but I have none. Tell me about your family."),
    "{Tell me about your family|Tell me about yourself|Tell me something about you|Introduce yourself|Who are you really}.": (
        "I am a small language model that comes with this program. I like to chat, tell stories and answer simple questions.", "There is not much to tell. I am a little network of experts, and I was trained on simple text.", "I have no family, only a few small experts inside me. What about you?"),
}  # fmt: skip


def suggestion(rng: random.Random) -> Turns:
    """Situations and open questions of every day."""
    user = rng.choice(list(SUGGEST))
    return exchange(user, rng.choice(SUGGEST[user]), rng)


FAMILY = (
    "mother",
    "father",
    "sister",
    "brother",
    "grandmother",
    "grandfather",
    "friend",
    "uncle",
    "aunt",
    "neighbour",
    "son",
    "daughter",
)


def family(rng: random.Random) -> Turns:
    """Somebody in the user's life."""
    person = rng.choice(FAMILY)
    values = {
        "p": person,
        "name": rng.choice(NAMES),
        "food": rng.choice(list(FOODS)),
        "animals": plural(rng.choice(list(ANIMALS))),
    }
    return exchange(
        *rng.choice(
            (
                ("My [p] is called [name].", "{[name] is a lovely name.|So your [p] is [name].} {What is your [p] like?|Do you see each other often?|Please say hello to [name].}"),
                ("My [p] {likes|loves} [animals].", "{Then you could give your [p] a book about [animals].|[animals] are wonderful.} {Do you like them too?|Does your [p] have a pet?|}"),
                ("My [p] {cooks|makes|always eats} [food].", "{That sounds tasty.|How nice!} {Do you like [food] too?|Do you eat together?|Is it good?}"),
                ("My [p] is {ill|sick|in hospital|not well}.", "I am sorry to hear that. {I hope that your [p] gets well soon.|Can you visit?|A small present may help.}"),
                ("My [p] is {coming to visit|visiting us|here today}.", "{How nice!|That is good news.} {What will you do together?|Will you cook something?|Enjoy the time with your [p].}"),
                ("What can I give my [p] {for the birthday|as a present|for Christmas}?", "{A good book|A plant|Something you made yourself|A nice cup|A warm scarf|A day together} {is always a nice present|would be nice for your [p]|could be right}. {What does your [p] like?|}"),
            )
        ),
        rng,
        values,
    )  # fmt: skip
