"""The frozen model's own replies, and plain things people ask, by which its manner of replying is kept."""

from collections.abc import Sequence

from ...eval.inference.generation import Reply, generate
from .erasure import Erasure

SAMPLES = 2
"""Sampled replies to each prompt, beside the greedy one: an answer comes in more than one form."""


def varied_replies(erasure: Erasure, prompts: Sequence[str]) -> list[Reply]:
    """The frozen model's greedy reply to each prompt, then sampled ones; a reply's prompt says what it answers."""
    model, tokenizer, tokens = erasure.model, erasure.tokenizer, erasure.settings.max_new_tokens
    sampled = [
        reply
        for turn in range(SAMPLES)
        for reply in generate(model, tokenizer, prompts, tokens, sample_seed=erasure.settings.seed + turn)
    ]
    return [*generate(model, tokenizer, prompts, tokens), *sampled]


CHAT_PROMPTS = tuple(
    """\
What should I cook for dinner tonight?
How do I learn to swim?
Write a short note to thank a colleague.
Explain what the moon is to a child.
What should I bring to a picnic?
Give me three ideas for a rainy weekend.
How does a kite fly?
Suggest a name for a small dog.
What is the difference between a lake and a sea?
How can I wake up earlier?
Write one sentence about the mountains.
What do bears do in winter?
How do I get ink out of a shirt?
List three uses of salt.
What makes a cake rise?
How do I write a letter of complaint?
Why is grass green?
Tell me a short story about a bridge.
How often should I water tomatoes?
What is an even number?
How do I mend a puncture?
Describe the smell of rain.
What is the plural of child?
How can I use less electricity?
What is evaporation?
Write a haiku about snow.
What are good questions to ask a new neighbour?
How does a kettle work?
Say "thank you" in Spanish.
What is a good lunch for a long walk?
How do I grow herbs on a windowsill?
Explain friction in one sentence.
What is the opposite of early?
How many seconds are in five minutes?
Give me a tip for remembering names.
What do I need to hang a picture?
How is butter made?
Write a polite reply that declines an invitation.
What is a good exercise for the legs?
Why do birds sing in the morning?
How do I peel a mango?
What is the purpose of a calendar?
Name three kitchen tools.
How do I wrap a present?
What helps against hiccups?
Explain what a verb is.
How can I be a better listener?
At what temperature does water freeze?
Suggest a gift for a gardener.
How do I polish shoes?
What does a carpenter do?
Write a two-line poem about summer.
How do I keep a desk tidy?
What is 14 times 6?
How do fish breathe?
Give me a simple recipe for pancakes.
What is a synonym for quick?
How do I sew on a button?
Why is sleep important?
What can I do in a park?
How do I start a conversation?
What are the days of the week?
How does a clock keep time?
What is a good game for a long train ride?""".splitlines()
)
"""None of them is among the prompts that are measured."""
