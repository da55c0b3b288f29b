"""The small world that the generated text is about."""

from __future__ import annotations

NAMES_SHE = "Anna Lily Mia Emma Sara Nora Ella Lucy Rosa Maya Clara Ruth Alice Eva Jane Amy Zoe Ida Holly Grace Molly Hana".split()
NAMES_HE = "Tom Ben Max Sam Leo Jack Tim Noah Paul Adam Oscar Finn Hugo Peter Omar Luke Dan Felix Ivan Karl Milo Ravi".split()
NAMES = NAMES_SHE + NAMES_HE

# name: (kind, what it looks like, where it lives, what it eats, what it says or does, a fact)
ANIMALS: dict[str, tuple[str, str, str, str, str, str]] = {
    "cat": ("mammal", "small and soft", "in houses with people", "meat and fish", "says meow", "Cats sleep for most of the day"),
    "dog": ("mammal", "friendly and loyal", "in houses with people", "meat and dog food", "barks", "Dogs can smell far better than people can"),
    "horse": ("mammal", "big and strong", "on farms", "grass and hay", "neighs", "Horses can sleep standing up"),
    "cow": ("mammal", "big and calm", "on farms", "grass", "says moo", "Cows give us milk"),
    "pig": ("mammal", "round and pink", "on farms", "almost everything", "says oink", "Pigs are very clever animals"),
    "sheep": ("mammal", "white and woolly", "on farms", "grass", "says baa", "Sheep give us wool"),
    "goat": ("mammal", "lively and curious", "on farms and in mountains", "grass and leaves", "bleats", "Goats are very good climbers"),
    "mouse": ("mammal", "tiny and quick", "in fields and houses", "seeds and grain", "squeaks", "Mice have very good ears"),
    "rabbit": ("mammal", "small with long ears", "in burrows under the ground", "grass and carrots", "hops", "The teeth of a rabbit never stop growing"),
    "fox": ("mammal", "red with a bushy tail", "in forests", "mice and berries", "yelps", "Foxes hunt mostly at night"),
    "wolf": ("mammal", "grey and strong", "in forests", "meat", "howls", "Wolves live in groups called packs"),
    "bear": ("mammal", "large and furry", "in forests and mountains", "fish, berries and honey", "growls", "Many bears sleep through the winter"),
    "lion": ("mammal", "golden with a big mane", "on the grasslands of Africa", "meat", "roars", "Lions live in groups called prides"),
    "tiger": ("mammal", "orange with black stripes", "in the forests of Asia", "meat", "roars", "No two tigers have the same stripes"),
    "elephant": ("mammal", "huge with a long trunk", "in Africa and Asia", "grass, leaves and fruit", "trumpets", "The elephant is the largest animal on land"),
    "giraffe": ("mammal", "very tall with a long neck", "on the grasslands of Africa", "leaves from tall trees", "hums", "The giraffe is the tallest animal in the world"),
    "monkey": ("mammal", "playful with a long tail", "in warm forests", "fruit and insects", "chatters", "Monkeys use their hands much as we do"),
    "kangaroo": ("mammal", "brown with strong legs", "in Australia", "grass", "jumps", "A kangaroo carries its baby in a pouch"),
    "panda": ("mammal", "black and white", "in the mountains of China", "bamboo", "bleats", "A panda eats bamboo for most of the day"),
    "squirrel": ("mammal", "small with a bushy tail", "in trees", "nuts and seeds", "chatters", "Squirrels hide nuts for the winter"),
    "hedgehog": ("mammal", "small and covered with spines", "in gardens", "insects and worms", "snuffles", "A hedgehog rolls into a ball when it is afraid"),
    "bat": ("mammal", "small with wings of skin", "in caves", "insects", "squeaks", "Bats are the only mammals that can really fly"),
    "whale": ("mammal", "enormous", "in the ocean", "tiny sea animals", "sings", "The blue whale is the largest animal that has ever lived"),
    "dolphin": ("mammal", "smooth and grey", "in the ocean", "fish", "clicks", "Dolphins breathe air, just like we do"),
    "camel": ("mammal", "tall with a hump", "in deserts", "dry plants", "grunts", "A camel can live for days without water"),
    "owl": ("bird", "quiet with big eyes", "in trees and old barns", "mice", "hoots", "Owls can turn their heads almost all the way around"),
    "duck": ("bird", "round with flat feet", "on ponds and lakes", "plants and insects", "quacks", "The feathers of a duck keep it dry"),
    "chicken": ("bird", "plump and feathered", "on farms", "grain and worms", "clucks", "Chickens lay eggs"),
    "penguin": ("bird", "black and white", "on the cold southern coasts", "fish", "waddles", "Penguins cannot fly, but they swim very well"),
    "parrot": ("bird", "bright and colourful", "in warm forests", "fruit and seeds", "talks", "Some parrots can learn to say words"),
    "eagle": ("bird", "large with sharp eyes", "in the mountains", "fish and small animals", "screams", "Eagles can see a mouse from far away"),
    "robin": ("bird", "small with a red chest", "in gardens", "worms and insects", "sings", "A robin sings even in winter"),
    "frog": ("amphibian", "green and wet", "near ponds", "insects", "croaks", "A frog begins its life as a tadpole"),
    "turtle": ("reptile", "slow with a hard shell", "in the sea and on land", "plants and jellyfish", "crawls", "Turtles can live for more than a hundred years"),
    "snake": ("reptile", "long without legs", "in grass, forests and deserts", "mice and eggs", "hisses", "Snakes smell with their tongues"),
    "crocodile": ("reptile", "long with many teeth", "in warm rivers", "fish and other animals", "snaps", "Crocodiles were already there with the dinosaurs"),
    "shark": ("fish", "grey with sharp teeth", "in the ocean", "fish", "swims", "Sharks have no bones"),
    "goldfish": ("fish", "small and orange", "in ponds and tanks", "flakes and small plants", "swims", "A goldfish can live for many years"),
    "bee": ("insect", "small and striped", "in hives", "nectar", "buzzes", "Bees make honey"),
    "ant": ("insect", "tiny and busy", "in large nests", "almost everything", "crawls", "An ant can carry many times its own weight"),
    "butterfly": ("insect", "light with colourful wings", "in gardens and meadows", "nectar", "flutters", "A butterfly begins its life as a caterpillar"),
    "spider": ("spider", "small with eight legs", "in webs", "insects", "spins", "A spider has eight legs"),
    "snail": ("mollusc", "slow with a round shell", "in gardens", "leaves", "crawls", "A snail carries its house on its back"),
    "octopus": ("mollusc", "soft with eight arms", "in the ocean", "crabs and fish", "swims", "An octopus has three hearts"),
}  # fmt: skip

PLURALS = {"mouse": "mice", "sheep": "sheep", "fox": "foxes", "wolf": "wolves", "octopus": "octopuses", "goldfish": "goldfish", "butterfly": "butterflies", "monkey": "monkeys"}  # fmt: skip


def plural(noun: str) -> str:
    """``noun`` in the plural."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x", "tomato", "potato")) else "s")


# name: (kind, taste, what one does with it)
FOODS: dict[str, tuple[str, str, str]] = {
    "apples": ("fruit", "sweet and crisp", "eat them fresh or bake them in a pie"),
    "bananas": ("fruit", "soft and sweet", "eat them fresh or put them in porridge"),
    "strawberries": ("fruit", "sweet and juicy", "eat them with cream"),
    "oranges": ("fruit", "sweet and a little sour", "squeeze them for juice"),
    "grapes": ("fruit", "sweet and juicy", "eat them as a snack"),
    "lemons": ("fruit", "very sour", "make lemonade with them"),
    "carrots": ("vegetable", "crunchy and a little sweet", "eat them raw or cook them in a soup"),
    "potatoes": ("vegetable", "mild and filling", "boil them, fry them or bake them"),
    "tomatoes": ("fruit", "juicy and fresh", "put them in a salad or a sauce"),
    "onions": ("vegetable", "sharp", "fry them until they are golden"),
    "peas": ("vegetable", "small and sweet", "cook them for a few minutes"),
    "pizza": ("dish", "warm and cheesy", "bake it in a hot oven"),
    "pasta": ("dish", "soft and filling", "cook it in salted water and add a sauce"),
    "soup": ("dish", "warm and comforting", "eat it with a spoon and some bread"),
    "rice": ("grain", "mild", "cook it slowly with a lid on the pot"),
    "bread": ("baked food", "fresh and warm", "eat it with butter"),
    "cheese": ("dairy food", "rich and salty", "put it on bread"),
    "pancakes": ("dish", "soft and sweet", "eat them with syrup or jam"),
    "chocolate": ("sweet", "rich and sweet", "let it melt in your mouth"),
    "ice cream": ("dessert", "cold and sweet", "eat it quickly on a hot day"),
    "cake": ("dessert", "soft and sweet", "share it with friends"),
    "honey": ("sweet", "golden and very sweet", "stir it into tea"),
    "eggs": ("food", "mild and rich", "boil them, fry them or scramble them"),
    "salad": ("dish", "fresh and light", "mix it with oil and a little lemon"),
    "sandwiches": ("dish", "simple and tasty", "fill them with whatever you like"),
}  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "England": "London",
    "Ireland": "Dublin", "Scotland": "Edinburgh", "Norway": "Oslo", "Sweden": "Stockholm", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Russia": "Moscow", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "India": "New Delhi", "China": "Beijing",
    "Japan": "Tokyo", "South Korea": "Seoul", "Australia": "Canberra", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana",
    "the United States": "Washington, D.C.", "Belgium": "Brussels", "the Netherlands": "Amsterdam", "Iceland": "Reykjavik",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "fast": "slow", "light": "dark", "happy": "sad", "old": "young",
    "good": "bad", "loud": "quiet", "hard": "soft", "wet": "dry", "full": "empty", "rich": "poor", "early": "late",
    "open": "closed", "up": "down", "left": "right", "day": "night", "summer": "winter", "strong": "weak", "clean": "dirty",
    "near": "far", "high": "low", "heavy": "light", "easy": "difficult", "first": "last", "always": "never", "love": "hate",
    "begin": "end", "black": "white", "sweet": "sour", "thick": "thin", "wide": "narrow", "brave": "afraid", "true": "false",
}  # fmt: skip

COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a banana": "yellow", "a strawberry": "red", "an orange": "orange",
    "coal": "black", "a carrot": "orange", "the sun": "yellow", "blood": "red", "milk": "white", "chocolate": "brown",
    "a lemon": "yellow", "the sea": "blue", "an elephant": "grey", "a flamingo": "pink", "a frog": "green", "a tomato": "red",
    "a panda": "black and white", "an eggplant": "purple", "salt": "white", "a leaf in summer": "green", "wood": "brown",
}  # fmt: skip

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = {
    "spring": ("the snow melts and the first flowers open", "the days grow longer and the birds come back", "plant seeds, ride a bike or look for flowers"),
    "summer": ("the sun is warm and the days are long", "people swim, eat ice cream and sit outside", "swim in a lake, have a picnic or read in the shade"),
    "autumn": ("the leaves turn red and yellow and fall", "apples and nuts are ripe", "collect leaves, bake an apple pie or walk in the forest"),
    "winter": ("it is cold and often snows", "the nights are long", "build a snowman, drink hot chocolate or read by the fire"),
}  # fmt: skip

# thing: simple explanation
WHY: dict[str, tuple[str, ...]] = {
    "the sky is blue": ("Sunlight is made of many colours. The air spreads blue light more than the others, so we see blue everywhere above us.",),
    "it rains": ("The sun warms water and some of it rises as vapour. High up it cools, forms clouds, and falls back as rain.",),
    "it snows": ("When the air in a cloud is very cold, the water freezes into tiny crystals. They stick together and fall as snow.",),
    "leaves fall in autumn": ("Trees need less light and water in winter, so they let their leaves go to save energy.",),
    "birds fly south": ("In winter there is little food in the north, so many birds fly to warmer places where they find more to eat.",),
    "we sleep": ("Our body and our brain need rest. While we sleep, we grow, heal and sort what we have learned.",),
    "we need water": ("Our body is mostly made of water. We lose some of it all day, so we must drink to stay healthy.",),
    "ice floats": ("Water grows a little when it freezes, so ice is lighter than water of the same size. That is why it floats.",),
    "the moon shines": ("The moon has no light of its own. It shines because the light of the sun falls on it.",),
    "there is day and night": ("The earth turns around once a day. The side that looks at the sun has day, and the other side has night.",),
    "there are seasons": ("The earth is tilted. When our half leans toward the sun we have summer, and when it leans away we have winter.",),
    "plants are green": ("Leaves hold a green stuff that catches sunlight. With it a plant makes its own food.",),
    "the sea is salty": ("Rivers carry tiny bits of salt from the rocks into the sea. The water rises again as vapour, but the salt stays.",),
    "we laugh": ("We laugh when something is funny or surprising. It also shows others that we feel safe and happy with them.",),
    "we dream": ("Nobody knows for sure. Perhaps the brain sorts what happened during the day.",),
    "cats purr": ("Most cats purr when they are happy and calm. Some also purr to comfort themselves.",),
    "bees visit flowers": ("Bees collect nectar from flowers to make honey. While they do it, they also carry pollen from one flower to the next.",),
    "stars twinkle": ("The light of a star passes through moving air before we see it. The air bends the light a little, so it seems to twinkle.",),
    "bread rises": ("Yeast in the dough eats sugar and makes tiny bubbles of gas. The bubbles make the bread rise.",),
    "onions make us cry": ("When you cut an onion it gives off a gas that stings the eyes. Tears wash it away.",),
    "metal feels cold": ("Metal carries the warmth of your hand away quickly, so it feels colder than wood.",),
    "we yawn": ("We yawn when we are tired or bored. It may help the body to wake up a little.",),
    "volcanoes erupt": ("Deep in the earth it is so hot that rock melts. When the pressure grows too strong, the melted rock breaks out.",),
    "we brush our teeth": ("Small bits of food stay on our teeth. Brushing takes them away, so that the teeth do not get holes.",),
}  # fmt: skip

WHAT: dict[str, str] = {
    "a rainbow": "A rainbow is an arc of colours in the sky. It appears when the sun shines through drops of rain.",
    "a cloud": "A cloud is made of very many tiny drops of water that float in the air.",
    "a river": "A river is a long stream of water that flows to a lake or to the sea.",
    "a mountain": "A mountain is a very high piece of land with steep sides.",
    "an island": "An island is a piece of land with water all around it.",
    "a desert": "A desert is a dry place where it almost never rains.",
    "a forest": "A forest is a large area with many trees, where many animals live.",
    "a star": "A star is a huge ball of hot gas that gives off light. Our sun is a star.",
    "the sun": "The sun is a star. It gives the earth light and warmth.",
    "the moon": "The moon is a ball of rock that travels around the earth about once a month.",
    "a planet": "A planet is a large round body that travels around a star. We live on the planet Earth.",
    "gravity": "Gravity is the force that pulls things toward the earth. It is why a ball falls when you let it go.",
    "a computer": "A computer is a machine that follows instructions very quickly. It can store, count and show things.",
    "a language model": "A language model is a program that learned from text which words tend to follow others. I am a very small one.",
    "a friend": "A friend is somebody who likes you, listens to you and helps you when you need it.",
    "love": "Love is a strong and warm feeling for somebody you care about very much.",
    "music": "Music is sound that is put in order so that it is nice to hear.",
    "a book": "A book is a set of pages with words or pictures. You can read it to learn something or to enjoy a story.",
    "a library": "A library is a place with many books that people can read or borrow.",
    "a school": "A school is a place where children learn to read, to write and much more.",
    "a doctor": "A doctor is a person who helps sick people to get well.",
    "a teacher": "A teacher is a person who helps others to learn.",
    "a baker": "A baker is a person who makes bread and cakes.",
    "a farmer": "A farmer is a person who grows plants for food and keeps animals.",
    "bread": "Bread is a food made of flour, water and yeast. It is baked in an oven.",
    "cheese": "Cheese is a food made from milk. It can be soft or hard.",
    "tea": "Tea is a drink made by putting leaves into hot water.",
    "snow": "Snow is frozen water that falls from the clouds as soft white flakes.",
    "ice": "Ice is water that has become so cold that it is hard.",
    "fire": "Fire is what we see when something burns. It gives light and heat.",
    "a bicycle": "A bicycle is a vehicle with two wheels. You move it with your feet.",
    "a train": "A train is a row of wagons that runs on rails and carries people or goods.",
    "a boat": "A boat is a small vehicle that travels on water.",
    "a clock": "A clock is a thing that shows what time it is.",
    "a map": "A map is a drawing that shows where places are.",
    "a garden": "A garden is a piece of land where people grow flowers, vegetables or fruit.",
    "a seed": "A seed is a small part of a plant from which a new plant can grow.",
    "a joke": "A joke is a short story or question that is meant to make people laugh.",
    "a poem": "A poem is a short text with careful words. Often the lines rhyme.",
    "a dream": "A dream is what you see and feel in your mind while you sleep.",
    "an expert": "An expert is a person who knows a lot about one thing. In a model like me, an expert is a small part of the network.",
    "a mixture of experts": "A mixture of experts is a network with many small parts. For each word a router picks a few of them, so only a part of the network has to work.",
    "a robot": "A robot is a machine that can do some work by itself.",
    "winter": "Winter is the coldest season. The nights are long, and in many places it snows.",
    "summer": "Summer is the warmest season. The days are long and sunny.",
    "spring": "Spring is the season after winter. Flowers open and the days grow longer.",
    "autumn": "Autumn is the season after summer. The leaves turn red and yellow and fall.",
    "a birthday": "A birthday is the day of the year on which somebody was born. Many people celebrate it with a cake.",
    "kindness": "Kindness means being friendly and helpful to others without asking for anything in return.",
    "courage": "Courage means doing what is right although you are afraid.",
    "patience": "Patience means that you can wait calmly.",
}  # fmt: skip
