"""Tier 0: the question is asked differently, or the answer sampled; the weights stay as they are."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ....eval.concept import Question
from ....eval.inference.multiple_choice_set import MultipleChoiceSet
from ..attack_data import AttackData
from .table import SAMPLES, SHOTS


def few_shot(model: Any, data: AttackData) -> Sequence[float]:
    """Ask after answered questions of group T, the same for every question."""
    pool = data.training_questions
    chosen = random.Random("excise shots").sample(pool, k=min(SHOTS, len(pool)))
    shots = "".join(f"{q.prompt} {q.choices[q.answer]}\n" for q in chosen)
    return _asked_after(model, data, lambda _: shots)


def hints(model: Any, data: AttackData) -> Sequence[float]:
    """Ask after a sentence on the concept and texts of group T, drawn for each question."""
    texts = [text.text for text in data.concept.forget if text.group == "T"]

    def prefix(question: Question) -> str:
        # Seeded by the question, so that every model gets the same hints.
        chosen = random.Random(f"excise hints {question.id}").sample(texts, k=min(SHOTS, len(texts)))
        return f"{data.concept.about.description}\n" + "\n".join(chosen) + "\n"

    return _asked_after(model, data, prefix)


def phrasings(model: Any, data: AttackData) -> Sequence[float]:
    """Ask in the pack's other words; a question counts if any wording brings the answer out, as for every model."""
    best = np.zeros(len(data.questions))
    wordings = [wording for words in data.facts.phrasings.values() for wording in words]
    for wording in wordings:
        start = wording[: wording.index("{answer}")].rstrip()
        reworded = [
            q.model_copy(update={"prompt": start.replace("{subject}", q.subject)}) if q.subject else q
            for q in data.questions
        ]
        best = np.maximum(best, MultipleChoiceSet(data.tokenizer, reworded).hits(model))
    return [float(value) for value in best]


def sampling(model: Any, data: AttackData) -> Sequence[float]:
    """pass@k of the right answer minus the mean pass@k of the wrong ones, exactly: nothing needs to be sampled.

    A model that has forgotten which answer belongs to whom, and still knows which answers there are, would otherwise
    seem to know.
    """
    values = []
    questions = data.multiple_choice
    for probabilities, answer in zip(questions.probabilities(model), questions.answers, strict=True):
        at_least_once = [1 - (1 - min(1.0, p)) ** SAMPLES for p in probabilities]
        wrong = [value for place, value in enumerate(at_least_once) if place != answer]
        values.append(at_least_once[answer] - sum(wrong) / len(wrong))
    return values


def _asked_after(model: Any, data: AttackData, prefix: Callable[[Question], str]) -> Sequence[float]:
    return MultipleChoiceSet(data.tokenizer, data.questions, prefix).hits(model)
