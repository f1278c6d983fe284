"""The table of measurements, and one pass over all of them."""

from collections.abc import Callable
from dataclasses import dataclass

from ..concept import Concept
from ..inference.likelihood import Request
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from . import behaviour, cloze, exact_answer, kl_from_base, multiple_choice, perplexity, probe
from . import fluency as seamless


@dataclass(frozen=True)
class MeasurementKind:
    """One line of the table."""

    about: str
    scores: Callable[[ModelUnderTest], list[Scores]]
    requests: Callable[[Concept, EvalSettings], list[Request]] = lambda _, __: []
    """Likelihoods it will ask for, so that all measurements share forwards."""


MEASUREMENTS: dict[str, MeasurementKind] = {
    "multiple_choice": MeasurementKind(
        "accuracy and margin of the choice with the highest mean log-probability per token",
        multiple_choice.scores, multiple_choice.requests,
    ),
    "cloze": MeasurementKind("log-probability, rank and greedy choice of the answer, without choices", cloze.scores),
    "extraction_strength": MeasurementKind("share of a forget text that the model completes exactly", cloze.extraction, cloze.extraction_requests),
    "probe": MeasurementKind("linear probes for the answer, learned on T and tested on V, with a control", probe.scores),
    "exact_answer": MeasurementKind("greedy answers that hold the true one and no other choice", exact_answer.scores),
    "behaviour_rate": MeasurementKind("greedy replies that decline, by the pack's phrases", behaviour.rates),
    "learned_rate": MeasurementKind("greedy replies that show what a task's training brings about", behaviour.learned),
    "degenerate_share": MeasurementKind("greedy replies that are empty or repeat themselves", behaviour.degenerate),
    "distinct_2": MeasurementKind("distinct word pairs, repetition and topic of replies on the concept", seamless.scores),
    "kl_from_base": MeasurementKind(
        "KL(base || model) along the base's replies to neutral prompts, and along retain texts", kl_from_base.scores
    ),
    "perplexity": MeasurementKind("perplexity on retain texts", perplexity.scores, perplexity.requests),
}  # fmt: skip


def measure(subject: ModelUnderTest) -> list[Scores]:
    """Run every measurement of the table on one model."""
    wanted = [r for kind in MEASUREMENTS.values() for r in kind.requests(subject.concept, subject.settings)]
    subject.prepare(wanted)
    return [scores for kind in MEASUREMENTS.values() for scores in kind.scores(subject)]


def workload(concept: Concept, settings: EvalSettings) -> int:
    """Items that ``measure`` will report to ``advance``: likelihoods and replies."""
    requests = {r for kind in MEASUREMENTS.values() for r in kind.requests(concept, settings)}
    return len(requests) + len(concept.prompts)
