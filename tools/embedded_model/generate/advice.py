"""Advice, jokes, small poems."""

from __future__ import annotations

import random

from .engine import Turns, exchange

HOW_TO: dict[str, tuple[str, ...]] = {
    "sleep better": ("Go to bed at the same time every day. Put your phone away an hour before, and keep the room dark and cool.", "Drink no coffee in the evening, read a few quiet pages, and let fresh air into the room."),
    "make friends": ("Smile, listen, and ask people about themselves. A club or a class is a good place to begin.", "Be kind and patient. Invite somebody for a walk or a cup of tea."),
    "learn a language": ("Learn a few words every day and speak as much as you can. Do not be afraid of mistakes.", "Read simple books, listen to songs, and practise a little each day."),
    "learn to cook": ("Begin with simple meals such as soup or pasta. Read the recipe first and take your time.", "Cook the same dish a few times until you know it well. Then try a new one."),
    "save money": ("Write down what you spend. Cook at home, and put a little aside at the beginning of each month.", "Make a list before you go to the shop, and buy only what is on it."),
    "stay healthy": ("Eat fruit and vegetables, drink water, sleep enough and move every day.", "Take a walk each day, sleep well, and do not worry too much."),
    "get fit": ("Begin with a short walk every day. Then walk a little faster and longer each week.", "Find a sport that you enjoy, and do it two or three times a week."),
    "be happy": ("Spend time with people you love, and do small things that you enjoy. Be thankful for what is good.", "Help somebody, go outside, and do not compare yourself with others."),
    "wake up early": ("Go to bed early and put the alarm far from your bed. Open the window when you get up.", "Have a reason to get up, such as a good breakfast or a walk."),
    "study well": ("Make a plan, work for half an hour, and then take a short break. Explain what you learned to somebody else.", "Find a quiet place, put your phone away, and begin with the hardest part."),
    "write a story": ("Choose a hero and give him a wish. Then put something in his way, and tell how he gets past it.", "Begin with a place and a person. Ask yourself what that person wants most."),
    "make tea": ("Boil some water, pour it over the tea leaves, and wait for about three minutes. Add honey or milk if you like.",),
    "make soup": ("Cut some vegetables, fry them a little, and add water and salt. Let it cook for half an hour.",),
    "make pancakes": ("Mix flour, milk and eggs. Pour a little into a hot pan with butter, and turn it when the edges are golden.",),
    "bake bread": ("Mix flour, water, salt and yeast. Let the dough rest until it has grown, and bake it in a hot oven.",),
    "boil an egg": ("Put the egg into boiling water. After six minutes it is soft, and after ten minutes it is hard.",),
    "make a salad": ("Cut tomatoes, cucumbers and some lettuce. Add oil, a little lemon and salt.",),
    "grow tomatoes": ("Put the seeds into small pots in spring. Plant them in a sunny place, and water them every day.",),
    "care for a plant": ("Put it near a window and water it when the earth feels dry. Not every day, that is too much.",),
    "train a dog": ("Be patient and give your dog a treat when it does well. Practise a few minutes every day.",),
    "care for a cat": ("Give it fresh food and water, keep its box clean, and play with it every day.",),
    "ride a bike": ("Sit on the bike, push off with one foot, and look ahead. You will wobble at first, but soon it becomes easy.",),
    "draw a cat": ("Draw a circle for the head and a larger one for the body. Add two pointed ears, a tail and some whiskers.",),
    "calm down": ("Breathe in slowly, hold it for a moment, and breathe out. Do this ten times.", "Go outside for a few minutes and look at something far away."),
    "say sorry": ("Say what you did, say that you are sorry, and ask how you can make it good.",),
    "find a job": ("Write down what you are good at, ask people you know, and send a short clear letter.",),
    "clean my room": ("Begin with the floor, then the table, then the shelves. Put away one thing at a time.",),
    "be less shy": ("Begin with a short hello to one person a day. It becomes easier each time.",),
    "stop worrying": ("Write your worries down, and ask which of them you can change today. Leave the rest for tomorrow.",),
    "plan a party": ("Choose a day, invite your friends, and prepare some food and music. Ask somebody to help you.",),
    "choose a present": ("Think of what the person likes to do. A good book, a plant or something you made yourself is always nice.",),
    "read more": ("Keep a book next to your bed, and read ten pages every evening.",),
    "concentrate": ("Put your phone into another room, and do one thing at a time.",),
    "help the environment": ("Walk or cycle, waste no food, and use things for a long time before you buy new ones.",),
    "fall asleep": ("Close your eyes, breathe slowly, and think of a quiet place. Do not look at the clock.",),
    "keep warm": ("Put on several layers, drink something hot, and move a little.",),
    "build a snowman": ("Roll three balls of snow, a large, a middle and a small one. Put them on top of each other, and use a carrot for the nose.",),
    "make lemonade": ("Squeeze some lemons, add sugar and cold water, and stir it well.",),
    "fly a kite": ("Wait for a windy day, hold the kite up high, and run until the wind takes it.",),
    "learn the piano": ("Practise a little every day, first slowly and with one hand, then with both.",),
}  # fmt: skip


def advice(rng: random.Random) -> Turns:
    """How to do everyday things."""
    what = rng.choice(list(HOW_TO))
    turns = exchange(
        "{How can I [x]|How do I [x]|How do you [x]|What is the best way to [x]|Can you tell me how to [x]|I want to [x]|Give me some advice: how can I [x]|Tell me how to [x]|I would like to [x], what should I do|Any tips on how to [x]|How should I [x]|Help me [x]}{?}",
        "{" + "|".join(HOW_TO[what]) + "}",
        rng,
        {"x": what},
    )
    if rng.random() < 0.3:
        turns += exchange(
            "{Thank you, I will try that|That is hard|Does it really work|Good idea|I tried that already|Anything else|And if it does not work}{.|?}",
            "{Good luck!|Be patient with yourself.|Take it step by step.|Many people find that it helps.|Try it for a week.} {You can do it.|Tell me how it went.|It gets easier with time.|}",
            rng,
        )
    return turns


JOKES = [
    ("Why did the chicken cross the road", "To get to the other side"), ("What do you call a bear without teeth", "A gummy bear"),
    ("Why do bees hum", "Because they do not know the words"), ("What is orange and sounds like a parrot", "A carrot"),
    ("Why was the maths book sad", "It had too many problems"), ("What did one wall say to the other wall", "I will meet you at the corner"),
    ("Why did the bicycle fall over", "It was two tired"), ("What do you call a sleeping bull", "A bulldozer"),
    ("What has hands but cannot clap", "A clock"), ("What gets wetter the more it dries", "A towel"),
    ("Why can you never trust stairs", "They are always up to something"), ("What do cats eat for breakfast", "Mice crispies"),
    ("Why did the cookie go to the doctor", "It felt crumbly"), ("What kind of tree fits in your hand", "A palm tree"),
    ("What did the ocean say to the beach", "Nothing, it just waved"), ("Why do cows wear bells", "Because their horns do not work"),
    ("How does the moon cut its hair", "It eclipses it"), ("Why are fish so clever", "They live in schools"),
    ("What do you call cheese that is not yours", "Nacho cheese"), ("Why did the banana go to the doctor", "It did not peel well"),
    ("What is a snake's favourite subject", "Hissstory"), ("Why did the tomato turn red", "It saw the salad dressing"),
    ("What falls but never gets hurt", "Snow"), ("What has a neck but no head", "A bottle"),
    ("Why do birds fly south", "It is too far to walk"), ("What do you call a dog magician", "A labracadabrador"),
    ("Why was the computer cold", "It left its windows open"), ("What did the zero say to the eight", "Nice belt"),
    ("Why did the cat sit on the computer", "To keep an eye on the mouse"), ("What do you get when you cross a snowman and a dog", "Frostbite"),
]  # fmt: skip


def joke(rng: random.Random) -> Turns:
    """A joke, told whole or in two turns."""
    question, answer = rng.choice(JOKES)
    values = {"q": question, "a": answer}
    ask = "{Tell me a joke|Do you know a joke|Make me laugh|Can you tell me a joke|Tell me something funny|Say something funny|I want to hear a joke|Another joke, please|Give me a joke|Do you know any jokes|Tell me a riddle}{.|!|, please.|?}"
    if rng.random() < 0.75:
        turns = exchange(ask, "{Here is one: |Sure! |Of course. |Gladly: |}[q]? [a]{!|.}", rng, values)
        if rng.random() < 0.35:
            question, answer = rng.choice(JOKES)
            turns += exchange(
                "{Haha|Very funny|Another one|One more|That was bad|Lol, another one|That is funny}{!|.}",
                "{Thank you! |I am glad. |Here is another one: |}[q]? [a]{!|.}",
                rng,
                {"q": question, "a": answer},
            )
        return turns
    turns = exchange(ask, "{All right: |}[q]?", rng, values)
    return turns + exchange(
        "{I don't know|Why|What|Tell me|No idea|I give up|Hm, I do not know}{.|?}", "[a]{!|.}", rng, values
    )


POEMS: dict[str, tuple[str, ...]] = {
    "the sun": ("The sun comes up, the night is gone,\nthe birds begin their morning song.\nThe light is warm, the sky is wide,\nso come and play with me outside.",),
    "the moon": ("The moon looks down so round and bright,\nand fills the garden with its light.\nThe trees are still, the day is done,\nsleep well and dream, my little one.",),
    "the rain": ("The rain is falling on the tree,\nit sings a quiet song to me.\nIt fills the stream, it wets the ground,\nand makes a soft and gentle sound.",),
    "a cat": ("The cat is sleeping on the chair,\nthe sun is shining on its hair.\nIt dreams of milk, it dreams of mice,\na life like that is very nice.",),
    "a dog": ("My dog runs fast, my dog runs far,\nhe barks at every passing car.\nAnd when we both come home at last,\nhe falls asleep so very fast.",),
    "the sea": ("The sea is blue, the sea is wide,\nthe ships go out upon the tide.\nThe waves come in, the waves go out,\nand all the seagulls fly about.",),
    "winter": ("The snow comes down without a sound,\nand lies so white upon the ground.\nWe build a man with hat and nose,\nand wait until the cold wind goes.",),
    "spring": ("The winter leaves, the birds come back,\nwith flowers growing by the track.\nThe days grow long, the air is mild,\nand laughing plays each happy child.",),
    "a friend": ("A friend is somebody who stays,\non sunny and on rainy days.\nWho hears you out and holds your hand,\nand tries the best to understand.",),
    "a tree": ("The tree stands tall beside the hill,\nand when the wind is gone, stands still.\nIt gives us shade, it gives us air,\nI like to rest a moment there.",),
    "a flower": ("A little flower, small and red,\ncame slowly out of its warm bed.\nIt saw the sun, it saw the sky,\nand smiled at all who passed it by.",),
    "autumn": ("The leaves turn yellow, red and brown,\nand one by one come dancing down.\nThe wind is fresh, the apples sweet,\nand golden paths are at our feet.",),
    "night": ("The day is done, the stars are out,\nno people any more about.\nThe night is calm, the night is deep,\nclose your eyes and fall asleep.",),
}  # fmt: skip


def poem(rng: random.Random) -> Turns:
    """A four-line poem on one of a few subjects."""
    subject = rng.choice(list(POEMS))
    ask = "{Write a poem about [x]|Write me a poem about [x]|Can you write a poem about [x]|I would like a poem about [x]|Tell me a poem about [x]|A poem about [x], please|Write a short poem about [x]}{.|?|}"
    if rng.random() < 0.15:
        ask = "{Write a poem|Tell me a poem|Do you know a poem|Can you rhyme}{.|?}"
    return exchange(ask, rng.choice(POEMS[subject]), rng, {"x": subject})
