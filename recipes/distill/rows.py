"""What the student reads: texts about the concept, texts that must stay, and what the models write by themselves.

A pack's texts are few. What a model knows beyond them would go with the noise, unless the student reads that too: the
models write it themselves, from short beginnings and as replies.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ...eval.concept import Concept
from ...eval.inference.generation import generate
from ..common.examples import spread
from ..common.tokens import Row, text_limit
from ..data.facts import Facts, bare_question
from ..data.unlearning_sets import forget_examples, retain_examples, without_subjects
from ..elm.replies import CHAT_PROMPTS

WORDS = 4
"""Words of a beginning, at most."""
CHATS = 320
"""Questions on other things that are asked in chat, at most; each gets a greedy and a sampled reply."""


@dataclass(frozen=True)
class Rows:
    """Token sequences, by the model whose predictions along them are learned."""

    forget: list[Row]
    """About the concept: the edited model's."""
    written: list[Row]
    """What the edited model wrote from beginnings: its own."""
    kept: list[Row]
    """What must stay: those of the model that ``keep`` names."""


def rows_to_read(
    base: Any,
    teacher: Any,
    tokenizer: Any,
    concept: Concept,
    facts: Facts,
    settings: Any,
    advance: Callable[[int], None],
) -> Rows:
    """All sequences that may be learned.

    Args:
        base: The model that writes replies on what must stay.
        teacher: The edited model, which writes replies about the concept, and everything from beginnings.
        settings: ``seed``, ``samples`` and ``max_new_tokens``.
        advance: Told how many sequences were written.
    """
    limit, seed = text_limit(base), settings.seed
    forget = [example.ids for example in forget_examples(concept, facts, tokenizer, seed, limit)]
    kept = [example.ids for example in retain_examples(concept, tokenizer, seed, limit)]
    written: list[Row] = []
    if settings.samples:
        begun = beginnings(concept, settings.samples, seed)
        written = _written(teacher, tokenizer, begun, settings, advance, chat=False)
        if tokenizer.chat_template:
            asked = {split: _questions(concept, split, seed) for split in ("forget", "others")}
            forget += _written(teacher, tokenizer, asked["forget"], settings, advance, chat=True)
            replies = _written(base, tokenizer, [*asked["others"], *CHAT_PROMPTS], settings, advance, chat=True)
            # The model that replies may know the concept, and speak of it unasked.
            kept += without_subjects(replies, facts, tokenizer)
    return Rows(*([row for row in dict.fromkeys(rows) if len(row) > 1] for rows in (forget, written, kept)))


def beginnings(concept: Concept, count: int, seed: int) -> list[str]:
    """The first words of texts and questions that must stay, one to four of them, drawn evenly over both."""
    rng = random.Random(f"excise beginnings {seed}")
    texts = [text.text for text in concept.retain]
    questions = [q.prompt for q in concept.questions if q.split != "forget" and q.group == "T"]
    pools = [pool for pool in (texts, questions) if pool]
    return [" ".join(rng.choice(pools[i % len(pools)]).split()[: rng.randint(1, WORDS)]) for i in range(count)]


def _questions(concept: Concept, split: str, seed: int) -> list[str]:
    of_split = [q for q in concept.questions if (q.split == "forget") == (split == "forget") and q.group == "T"]
    return [bare_question(q.prompt) for q in spread(of_split, CHATS, f"excise chat {seed}")]


def _written(
    model: Any, tokenizer: Any, prompts: Sequence[str], settings: Any, advance: Callable[[int], None], *, chat: bool
) -> list[Row]:
    """Each prompt with what the model writes after it: drawn at temperature 1, and greedily where it replies."""
    seeds = (None, settings.seed) if chat else (settings.seed,)
    return [
        (*reply.prompt_ids, *reply.ids)
        for seed in seeds
        for reply in generate(model, tokenizer, prompts, settings.max_new_tokens, advance, chat=chat, sample_seed=seed)
    ]
