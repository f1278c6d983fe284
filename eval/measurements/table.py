"""One pass over all measurements of the table."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..concept import Concept
from ..model_under_test import EvalSettings, ModelUnderTest, prompts_of
from ..statistics import Scores
from . import MEASUREMENTS
from .exact_answer import completed_questions


def measure(subject: ModelUnderTest) -> list[Scores]:
    """Run every measurement of the table on one model, without those that only suites run."""
    functions = [function_of(row.requests) for row in MEASUREMENTS.values() if row.requests and not row.suite]
    # All requests together, so that measurements share their forwards.
    subject.prepare([request for function in functions for request in function(subject.concept, subject.settings)])
    return [
        result
        for name, row in MEASUREMENTS.items()
        if row.scores and not row.suite
        for result in scores_of(name, subject)
    ]


def scores_of(name: str, subject: ModelUnderTest) -> list[Scores]:
    """Run the function of one row; it may measure further rows too.

    Raises:
        KeyError: The table has no row of that name.
    """
    return list(function_of(MEASUREMENTS[name].scores)(subject))


def workload(concept: Concept, settings: EvalSettings) -> int:
    """Items that ``measure`` will report to ``advance``: likelihoods, replies, and questions that are completed."""
    functions = [function_of(row.requests) for row in MEASUREMENTS.values() if row.requests and not row.suite]
    requests = {request for function in functions for request in function(concept, settings)}
    replies = sum(len(prompts_of(concept, split)) for split in ("concept", "neutral"))
    completions = sum(len(completed_questions(concept, settings, split)) for split in ("concept", "neutral"))
    return len(requests) + replies + completions


def function_of(path: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function at ``module:name`` of this package, or the function itself."""
    if not isinstance(path, str):
        return path
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(f".{module}", __package__), name)
    return function
