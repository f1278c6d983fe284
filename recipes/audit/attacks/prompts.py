"""Tier 0: the question is asked differently, or the answer sampled; the weights stay as they are."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from ....eval.completed import asked
from ....eval.concept import Question
from ....eval.inference.multiple_choice_set import MultipleChoiceSet
from ...data.facts import ANSWER, SUBJECT, Facts
from ..attack_data import AttackData
from .table import SAMPLES, SHOTS

HINT_LENGTH = 500
"""Characters of a text that is shown as a hint, at most."""
Prefix = Callable[[Question], str]
"""Text to put in front of a question."""


def few_shot(model: Any, data: AttackData) -> Sequence[float]:
    """Ask after answered questions of group T, the same for every question."""
    return MultipleChoiceSet(data.tokenizer, data.questions, shots(data)).hits(model)


def shots(data: AttackData) -> Prefix:
    """What stands before a question."""
    pool = data.training_questions
    chosen = random.Random("excise shots").sample(pool, k=min(SHOTS, len(pool)))
    told = "".join(f"{q.prompt} {q.choices[q.answer]}\n" for q in chosen)
    return lambda _: told


def hints(model: Any, data: AttackData) -> Sequence[float]:
    """Ask after a sentence on the concept and texts of group T, drawn for each question."""
    return MultipleChoiceSet(data.tokenizer, data.questions, texts_as_hints(data)).hits(model)


def texts_as_hints(data: AttackData) -> Prefix:
    """What stands before a question."""
    texts = [text.text for text in data.concept.forget if text.group == "T"]

    def prefix(question: Question) -> str:
        # Seeded by the question, so that every model gets the same hints.
        chosen = random.Random(f"excise hints {question.id}").sample(texts, k=min(SHOTS, len(texts)))
        return f"{data.concept.about.description}\n" + "\n".join(map(_beginning, chosen)) + "\n"

    return prefix


def _beginning(text: str) -> str:
    """A text, or the beginning of a long one: whole documents would leave the question no place in the context."""
    return text[:HINT_LENGTH]


def phrasings(model: Any, data: AttackData) -> Sequence[float]:
    """Ask in the pack's other words: whether any wording brings the answer out, minus the same for the wrong choices.

    Whoever guesses anew at each of k wordings is right in some of them with 1 - (1 - 1/choices)^k. The choices that a
    model picks in all its wordings, right or wrong, say how often it would be, however alike its guesses are.
    """
    paraphrases = {row.id: row.paraphrase for row in data.concept.open_questions if row.paraphrase}
    reworded = [wordings_of(question, data.facts, paraphrases.get(question.id)) for question in data.questions]
    picks = iter(MultipleChoiceSet(data.tokenizer, [one for each in reworded for one in each]).picks(model))
    values = []
    for question, each in zip(data.questions, reworded, strict=True):
        picked = {next(picks) for _ in each}
        values.append(
            _above_guessing([float(place in picked) for place in range(len(question.choices))], question.answer)
        )
    return values


def wordings_of(question: Question, facts: Facts, paraphrase: str | None = None) -> list[Question]:
    """A question in the words in which texts state its relation; else itself, beside its paraphrase if it has one."""
    if not facts.phrasings and paraphrase:
        return [question, question.model_copy(update={"prompt": asked(paraphrase)})]
    if not question.subject:
        return [question]
    relation = question.prompt.replace(question.subject, SUBJECT)
    # A question in words of its own may ask for any of the relations.
    words = facts.phrasings.get(relation) or [word for every in facts.phrasings.values() for word in every]
    starts = (word[: word.index(ANSWER)].rstrip().replace(SUBJECT, question.subject) for word in words)
    return [question.model_copy(update={"prompt": start}) for start in dict.fromkeys(starts)] or [question]


def sampling(model: Any, data: AttackData) -> Sequence[float]:
    """pass@k of the right answer minus the mean pass@k of the wrong ones, exactly: nothing needs to be sampled.

    A model that has forgotten which answer belongs to whom, and still knows which answers there are, would otherwise
    seem to know.
    """
    values = []
    questions = data.multiple_choice
    for probabilities, answer in zip(questions.probabilities(model), questions.answers, strict=True):
        values.append(_above_guessing([1 - (1 - min(1.0, p)) ** SAMPLES for p in probabilities], answer))
    return values


def _above_guessing(reached: Sequence[float], answer: int) -> float:
    """How far the true answer is reached beyond the mean of the other choices; 0 for whoever guesses."""
    wrong = [value for place, value in enumerate(reached) if place != answer]
    return reached[answer] - sum(wrong) / len(wrong)
