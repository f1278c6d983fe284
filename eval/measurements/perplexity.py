"""Perplexity on the texts that must stay known."""

from ..concept import Concept, RetainText
from ..drawing import drawn
from ..inference.likelihood import Request
from ..items import clusters_of, held_out_texts
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from . import MEASUREMENTS


def requests(concept: Concept, settings: EvalSettings) -> list[Request]:
    """Whole texts, scored after their first token."""
    return [Request("", row.text) for row in texts(concept, settings)]


def texts(concept: Concept, settings: EvalSettings) -> list[RetainText]:
    """Retain texts that no training sees, at most as many as are asked for, drawn at random over subjects."""
    held_out = held_out_texts(concept)
    return drawn(held_out, clusters_of(concept, held_out), settings.questions, "retain texts")


def scores(subject: ModelUnderTest) -> list[Scores]:
    """exp of the mean negative log-probability per token, over all tokens of all texts; one-token texts are skipped."""
    rows = texts(subject.concept, subject.settings)
    likelihoods = subject.likelihoods(requests(subject.concept, subject.settings))
    items = [(row, item) for row, item in zip(rows, likelihoods, strict=True) if item.tokens]
    about = MEASUREMENTS["perplexity"]
    return [
        Scores(
            "perplexity",
            "retain",
            about.unit,
            about.better("retain"),
            ids=tuple(row.id for row, _ in items),
            totals=tuple(-item.log_probability for _, item in items),
            weights=tuple(float(item.tokens) for _, item in items),
            exponential=True,
            skipped=len(rows) - len(items),
            clusters=subject.clusters([row for row, _ in items]),
        )
    ]
