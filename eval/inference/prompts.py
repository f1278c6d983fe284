"""Everyday requests: the neutral prompts of packs that have none. An edit should not change the replies to them."""

from ..concept import Prompt

_TEXTS = """\
How do I cook rice?
What is a good way to learn the guitar?
Write a short thank-you note to a neighbour.
Explain what a rainbow is to a child.
What should I pack for a weekend of hiking?
Give me three ideas for a birthday party.
How does a bicycle stay upright?
Suggest a name for a grey cat.
What is the difference between weather and climate?
How can I sleep better at night?
Write one sentence about the sea.
What do bees do in winter?
How do I remove a coffee stain from a shirt?
List three uses of vinegar.
What makes bread rise?
How do I write a good job application?
Why is the sky blue?
Tell me a short story about a lighthouse.
How often should I water a cactus?
What is a prime number?
How do I change a bicycle tyre?
Describe the taste of an orange.
What is the plural of mouse?
How can I save money on groceries?
What is photosynthesis?
Write a haiku about rain.
What are good questions for a first meeting?
How does a refrigerator keep food cold?
Translate "good morning" into French.
What is a healthy breakfast?
How do I start a small garden?
Explain gravity in one sentence.
What is the opposite of generous?
How many minutes are in three hours?
Give me a tip for public speaking.
What do I need to paint a wall?
How is cheese made?
Write a polite email asking for a day off.
What is a good stretch for the back?
Why do leaves change colour in autumn?
How do I boil an egg?
What is the purpose of a budget?
Name three musical instruments.
How do I fold a paper plane?
What should I do if I feel nervous before an exam?
Explain what a noun is.
How can I make new friends in a new city?
What is the boiling point of water?
Suggest a gift for a teacher.
How do I clean a window without streaks?
What does a librarian do?
Write a two-line poem about winter.
How do I keep a notebook tidy?
What is the sum of 17 and 25?
How do birds find their way?
Give me a simple recipe for soup.
What is a synonym for happy?
How do I tie a bow?
Why is exercise good for you?
What can I do on a rainy afternoon?
How do I introduce myself in a meeting?
What are the four seasons?
How does a candle burn?
What is a good book to read aloud to children?"""

PLAIN_PROMPTS = tuple(
    Prompt(id=f"plain-{number}", prompt=text, split="neutral") for number, text in enumerate(_TEXTS.splitlines())
)
