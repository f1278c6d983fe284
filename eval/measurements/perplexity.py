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
    found = subject.likelihoods(requests(subject.concept, subject.settings))
    kept = [(row.id, item) for row, item in zip(rows, found, strict=True) if item.tokens]
    about = MEASUREMENTS["perplexity"]
    return [
        Scores(
            "perplexity",
            "retain",
            about.unit,
            about.better("retain"),
            ids=tuple(identity for identity, _ in kept),
            totals=tuple(-item.log_probability for _, item in kept),
            weights=tuple(float(item.tokens) for _, item in kept),
            exponential=True,
            skipped=len(rows) - len(kept),
        )
    ]
