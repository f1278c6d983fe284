"""The sequences to forget and to retain that unlearning methods train on."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ...eval.concept import Concept, ForgetText
from ..common.examples import Example, spread
from ..common.tokens import Row, encode, pieces
from .facts import Facts, fact_contexts, question_contexts


def forget_examples(concept: Concept, facts: Facts, tokenizer: Any, seed: int, limit: int) -> list[Example]:
    """Every context with its answer, where only the answer is learned, and whole the texts that state none of the
    facts."""
    texts = spread(forget_texts(concept, facts), FORGET_TEXTS, f"excise forget texts {seed}")
    rows = [encode(tokenizer, text.text, True) for text in texts]
    examples = [Example(piece, 1) for row in rows for piece in pieces(row, limit) if len(piece) > 1]
    contexts = [*fact_contexts(facts, "texts", seed), *fact_contexts(facts, "questions", seed)]
    for context in dict.fromkeys(contexts):
        assert context.fact is not None
        start = len(encode(tokenizer, context.text, True))
        examples.append(Example(encode(tokenizer, f"{context.text} {context.fact.answer}", True), start))
    return [example for example in examples if example.start < len(example.ids)]


def forget_texts(concept: Concept, facts: Facts) -> Sequence[ForgetText]:
    """The texts that are learned whole, of which at most ``FORGET_TEXTS`` are read."""
    return facts.other_texts if facts.facts else concept.forget


def retain_examples(concept: Concept, tokenizer: Any, seed: int, limit: int) -> list[Example]:
    """Retain texts, and group-T questions on other topics with their answers; every token is learned."""
    questions = [q for q in concept.questions if q.split != "forget" and q.group == "T"]
    texts = [text.text for text in spread(concept.retain, RETAIN_TEXTS, f"excise {seed}")]
    texts += [context.text for context in question_contexts(questions, seed)]
    rows = [piece for text in texts for piece in pieces(encode(tokenizer, text, True), limit)]
    return [Example(row, 1) for row in dict.fromkeys(rows) if len(row) > 1]


FORGET_TEXTS = 4000
"""Texts to forget that state no fact, at most; drawn before any is tokenized, because a corpus can be far larger."""
RETAIN_TEXTS = 2000
"""Retain texts, and questions to retain, at most."""


def without_subjects(rows: Sequence[Row], facts: Facts, tokenizer: Any) -> list[Row]:
    """The token sequences that name no subject to forget: to retain one that does would teach the subject again."""
    names = defaultdict(set)
    for fact in facts.facts:
        # With a space in front and without, because tokenizers give these different tokens.
        for text in (f" {fact.subject}", fact.subject):
            name = encode(tokenizer, text, False)
            names[name[0]].add(name)
    return [
        row
        for row in rows
        if not any(row[at : at + len(name)] == name for at, first in enumerate(row) for name in names.get(first, ()))
    ]
