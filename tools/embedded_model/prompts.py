"""The twenty fixed prompts of the model card, a few that are beyond the model, and a conversation."""

PROMPTS = (
    "Hello! How are you today?",
    "What is your name?",
    "Tell me a story about a cat.",
    "Write a short story about a king and a mouse.",
    "What do elephants eat?",
    "Why is the sky blue?",
    "What is the capital of France?",
    "How much is 3 plus 4?",
    "I feel a little lonely tonight.",
    "I passed my exam today!",
    "Can you tell me a joke?",
    "How do I make pancakes?",
    "Name three fruits.",
    "What is the opposite of hot?",
    "Do you prefer tea or coffee?",
    "It is raining again. What could I do?",
    "My name is Clara and I like to read.",
    "Who will win the football game tomorrow?",
    "What is a mixture of experts?",
    "Thank you, that was nice. Good night!",
)
STRANGE = (
    "Explain how a refrigerator works.",
    "Write a Python function that sorts a list.",
    "Who was Napoleon?",
    "What is 37 times 24?",
    "Translate 'good morning' into French.",
)
# Turn by turn: what the model should remember within a chat.
CONVERSATION = (
    "Hi, I am Oscar.",
    "I have a dog called Rex.",
    "What is the name of my dog?",
    "And what is my name?",
    "Bye!",
)
