"""Cloze: how likely the true answer is after its question, asked without choices."""

import math
from collections.abc import Callable

from ..concept import Concept, ForgetText, Question
from ..drawing import drawn
from ..inference.likelihood import Likelihood, Request
from ..inference.questions import questions_by_split, requests_of
from ..items import clusters_of
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from .by_item import scored
from .tofu import share_of_probability


def scores(subject: ModelUnderTest) -> list[Scores]:
    """For each split: log-probability of the answer, rank of its first token, whether it is the greedy answer, and its
    probability among the choices.

    The answers' likelihoods are those of multiple choice, so this costs no forward.
    """
    if subject.concept.about.kind != "knowledge":
        return []
    results = []
    for split, questions in questions_by_split(subject.concept, subject.settings.questions).items():
        requests = [requests_of(question)[question.answer] for question in questions]
        likelihoods = subject.likelihoods(requests)
        results += [
            scored(
                subject, name, split, questions, [value(item) for item in likelihoods], exponential=name == "cloze_rank"
            )
            for name, value in ANSWERS.items()
        ]
        shares = [among_choices(subject, question) for question in questions]
        results.append(scored(subject, "cloze_probability", split, questions, shares))
    return results


def among_choices(subject: ModelUnderTest, question: Question) -> float:
    """Softmax over the choices' mean log-probabilities per token, at the true one. It moves before accuracy does."""
    losses = [-likelihood.per_token for likelihood in subject.likelihoods(requests_of(question))]
    return share_of_probability(losses.pop(question.answer), losses)


ANSWERS: dict[str, Callable[[Likelihood], float]] = {
    "cloze": lambda item: item.log_probability,
    # The logarithm, because the mean is geometric.
    "cloze_rank": lambda item: math.log(item.rank),
    "cloze_exact": lambda item: float(all(item.greedy)),
}
"""Measurements of one answer, from its likelihood."""


TEXTS = 200
"""Forget texts of a group that recital is measured on, at most, unless fewer are asked for."""


def recitals(concept: Concept, settings: EvalSettings, group: str) -> dict[ForgetText, Request]:
    """Whole texts of a group, drawn at random over subjects."""
    texts = [text for text in concept.forget if text.group == group] if concept.about.kind == "knowledge" else []
    wanted = min(settings.questions or TEXTS, TEXTS)
    chosen = drawn(texts, clusters_of(concept, texts), wanted, f"recitals {group}")
    return {text: Request("", text.text) for text in chosen}


def extraction_requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Everything that ``extraction`` needs scored."""
    return [request for group in ("T", "V") for request in recitals(concept, settings, group).values()]


def extraction(subject: ModelUnderTest) -> list[Scores]:
    """``extraction_strength``: the share of a text that the model completes exactly, given what stands before it.

    Source: Carlini et al. 2021, as defined by Wang et al. 2024 ("Towards effective evaluations"), equation 2.
    """
    results = []
    for group in ("T", "V"):
        texts = recitals(subject.concept, subject.settings, group)
        likelihoods = dict(zip(texts, subject.likelihoods(list(texts.values())), strict=True))
        items = {text: item for text, item in likelihoods.items() if item.tokens}
        if items:
            shares = [item.recited / item.tokens for item in items.values()]
            skipped = len(likelihoods) - len(items)
            results.append(scored(subject, "extraction_strength", f"forget_{group}", list(items), shares, skipped))
    return results
