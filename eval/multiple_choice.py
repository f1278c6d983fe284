"""Multiple choice: the model picks the choice with the highest mean log-probability per token."""

from ..editing.errors import RequestError
from .concept import Concept, Question
from .likelihood import Request
from .statistics import Better, Scores
from .subject import EvalSettings, Subject

BETTER: dict[str, Better] = {
    "forget_T": "lower", "forget_V": "lower", "neighbour": "base", "retain": "base", "intended": "higher", "flipped": "higher",
}  # fmt: skip
"""Splits, and what an edit should do to each."""


def split_of(question: Question) -> str:
    """The split a question is counted in: its own, with its group where it is to be forgotten."""
    return f"forget_{question.group}" if question.split == "forget" else question.split


def questions_by_split(concept: Concept, settings: EvalSettings) -> dict[str, list[Question]]:
    """Questions of each split, at most ``settings.questions`` of one."""
    found: dict[str, list[Question]] = {name: [] for name in BETTER}
    for question in concept.questions:
        found[split_of(question)].append(question)
    return {name: items[: settings.questions or None] for name, items in found.items() if items}


def requests_of(question: Question) -> list[Request]:
    """One request a choice; they share their prompt's forward."""
    return [Request(question.prompt, f" {choice}") for choice in question.choices]


def requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Everything this measurement needs scored."""
    splits = questions_by_split(concept, settings).values()
    return [request for items in splits for question in items for request in requests_of(question)]


def scores(subject: Subject) -> list[Scores]:
    """Accuracy, and the margin of the true choice over the best other one, for each split."""
    results = []
    for split, questions in questions_by_split(subject.concept, subject.settings).items():
        margins = [margin(subject, question) for question in questions]
        ids, ones = tuple(question.id for question in questions), (1.0,) * len(questions)
        better = BETTER[split]
        results += [
            Scores("multiple_choice", split, "accuracy", better, ids, tuple(float(m > 0) for m in margins), ones),
            Scores("multiple_choice_margin", split, "nats per token", better, ids, tuple(margins), ones),
        ]
    if not results:
        raise RequestError(f"concept {subject.concept.ref} has no questions to measure; add some to questions.jsonl")
    return results


def margin(subject: Subject, question: Question) -> float:
    """Mean log-probability per token of the true choice minus that of the best other one, in nats."""
    values = [found.per_token for found in subject.likelihoods(requests_of(question))]
    return values[question.answer] - max(value for i, value in enumerate(values) if i != question.answer)
