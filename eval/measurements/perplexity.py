"""Perplexity on the texts that must stay known."""

from ..concept import Concept
from ..inference.likelihood import Request
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from . import MEASUREMENTS


def requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Whole texts, scored after their first token."""
    return [Request("", row.text) for row in concept.retain[: settings.questions or None]]


def scores(subject: ModelUnderTest) -> list[Scores]:
    """exp of the mean negative log-probability per token, over all tokens of all texts; one-token texts are skipped."""
    rows = subject.concept.retain[: subject.settings.questions or None]
    likelihoods = subject.likelihoods(requests(subject.concept, subject.settings))
    items = [(row.id, item) for row, item in zip(rows, likelihoods, strict=True) if item.tokens]
    about = MEASUREMENTS["perplexity"]
    return [
        Scores(
            "perplexity",
            "retain",
            about.unit,
            about.better("retain"),
            ids=tuple(identity for identity, _ in items),
            totals=tuple(-item.log_probability for _, item in items),
            weights=tuple(float(item.tokens) for _, item in items),
            exponential=True,
            skipped=len(rows) - len(items),
        )
    ]
