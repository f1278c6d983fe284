"""One pass over all measurements of the table."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..concept import Concept
from ..model_under_test import EvalSettings, ModelUnderTest
from ..statistics import Scores
from . import MEASUREMENTS


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
    """Items that ``measure`` will report to ``advance``: likelihoods and replies."""
    functions = [function_of(row.requests) for row in MEASUREMENTS.values() if row.requests and not row.suite]
    return len({request for function in functions for request in function(concept, settings)}) + len(concept.prompts)


def function_of(path: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function at ``module:name`` of this package, or the function itself."""
    if not isinstance(path, str):
        return path
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(f".{module}", __package__), name)
    return function
