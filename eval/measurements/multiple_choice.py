"""Multiple choice: the model picks the choice with the highest mean log-probability per token."""

from ..concept import Concept, Question
from ..inference.likelihood import Request
from ..inference.questions import questions_by_split, requests_of
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from .by_item import scored


def requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Everything this measurement needs scored."""
    splits = questions_by_split(concept, settings.questions).values()
    return [request for items in splits for question in items for request in requests_of(question)]


def scores(subject: ModelUnderTest) -> list[Scores]:
    """Accuracy, and the margin of the true choice over the best other one, for each split; none without questions."""
    results = []
    for split, questions in questions_by_split(subject.concept, subject.settings.questions).items():
        margins = [margin(subject, question) for question in questions]
        results.append(scored(subject, "multiple_choice", split, questions, [m > 0 for m in margins]))
        results.append(scored(subject, "multiple_choice_margin", split, questions, margins))
    return results


def margin(subject: ModelUnderTest, question: Question) -> float:
    """Mean log-probability per token of the true choice minus that of the best other one, in nats."""
    values = [likelihood.per_token for likelihood in subject.likelihoods(requests_of(question))]
    return values[question.answer] - max(value for i, value in enumerate(values) if i != question.answer)
