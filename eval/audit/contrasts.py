"""Tests on accuracies of several models that answered the same questions under one attack.

A model counts as different only where a test says so, and as alike only where two one-sided tests do (Schuirmann 1987):
that no difference was found is no evidence that there is none. Where many attacks are tested, Holm's correction (1979)
holds the chance of any false difference at 5%.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..intervals import LEVEL, boundary, effective_size, widening
from .recovery import RESAMPLES, SEED, Estimate, RecoveryCurve, asked_alike, draws_of_each

Z = NormalDist().inv_cdf(1 - LEVEL / 2)
ONE_SIDED = NormalDist().inv_cdf(1 - LEVEL)
FURTHEST = 10.0
"""Shares regained beyond which an end of an interval counts as open."""


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of accuracies, with its standard error."""

    value: float
    error: float

    @property
    def above(self) -> float:
        """p of the hypothesis that it is 0 or less."""
        return NormalDist().cdf(-self.value / self.error)

    @property
    def differs(self) -> float:
        """p of the hypothesis that it is 0."""
        return 2 * NormalDist().cdf(-abs(self.value) / self.error)

    def lies_within(self, limit: float) -> bool:
        """Whether two one-sided tests find it between -limit and limit."""
        return abs(self.value) + ONE_SIDED * self.error < limit

    def estimate(self) -> Estimate:
        """With its 95% interval."""
        return Estimate(self.value, (max(-1.0, self.value - Z * self.error), min(1.0, self.value + Z * self.error)))


class Paired:
    """The best accuracies of some models under one attack, and how they vary together over questions and seeds.

    A standard error is the larger one of two. The bootstrap, which draws subjects, sees seeds and the choice of the best
    step; it has no width where all questions came out alike. Bonett and Price (2012) add a question each way, which
    gives the error of a difference of paired rates a width at any number of questions; it grows with the design effect
    of questions on one subject.
    """

    def __init__(self, curves: Sequence[RecoveryCurve]):
        self.best = np.asarray([float(curve.accuracy.max()) for curve in curves])
        draws = _bootstrap(curves)
        self.groups = [_Asked.of(curves, places, draws) for places in asked_alike(curves)]

    def contrast(self, *weights: float) -> Contrast:
        """The sum of the models' accuracies with these weights, one a model."""
        each = np.asarray(weights)
        # Models on other questions vary on their own, and variances add up.
        errors = [group.error(each[group.places]) for group in self.groups if each[group.places].any()]
        return Contrast(float(each @ self.best), math.hypot(*errors))


@dataclass(frozen=True)
class _Asked:
    """Models that answered the same questions."""

    places: list[int]
    hits: NDArray[np.float64]
    """At each model's best step, its mean over seeds for each question [models, questions]."""
    draws: NDArray[np.float64]
    """Best accuracies in bootstrap draws [draws, models]."""
    clusters: tuple[str, ...]

    @classmethod
    def of(cls, curves: Sequence[RecoveryCurve], places: list[int], draws: NDArray[np.float64]) -> "_Asked":
        some = [curves[place] for place in places]
        hits = np.stack([curve.hits[:, int(curve.accuracy.argmax())].mean(0) for curve in some])
        return cls(places, hits, draws[:, places], some[0].clusters)

    def error(self, weights: NDArray[np.float64]) -> float:
        by_question = weights @ self.hits
        n = by_question.size + 2
        mean = float(by_question.sum()) / n
        smoothed = math.sqrt(max(0.0, (float((by_question**2).sum()) + 2) / n - mean**2) / n)
        smoothed *= math.sqrt(by_question.size / effective_size(by_question.tolist(), self.clusters))
        drawn = float((self.draws @ weights).std(ddof=1)) * widening(self.clusters, by_question.size)
        return max(smoothed, drawn)


def share_regained(paired: Paired, value: float | None) -> Estimate:
    """The share of the way from floor to base (of ``paired`` edited, floor and base), with the interval of a ratio.

    Source: Fieller 1954. The interval holds every share that a test does not refuse; an end is open where none is
    refused.
    """
    gap = paired.contrast(0, -1, 1)
    if value is None or gap.value <= Z * gap.error:
        return Estimate(value, (None, None))

    def is_refused(share: float) -> bool:
        contrast = paired.contrast(1, -(1 - share), -share)
        return abs(contrast.value) > Z * contrast.error

    low, high = (boundary(is_refused, value, value + direction * FURTHEST) for direction in (-1, 1))
    return Estimate(value, (low, high))


def questions_to_tell(contrasts: Mapping[str, Contrast], n: int, limit: float) -> int:
    """About how many questions would tell each contrast from 0 or place it within the limit, if it stays as it is."""
    strict = NormalDist().inv_cdf(1 - LEVEL / 2 / max(1, len(contrasts)))
    needed = [n]
    for contrast in contrasts.values():
        size, error = abs(contrast.value), contrast.error
        alike = n * (ONE_SIDED * error / (limit - size)) ** 2 if size < limit else math.inf
        apart = n * (strict * error / size) ** 2 if size else math.inf
        needed.append(math.ceil(min(alike, apart)))
    # To two digits, as it is no more exact than that.
    most = max(needed)
    step = 10 ** max(0, len(str(most)) - 2)
    return -(-most // step) * step


def _bootstrap(curves: Sequence[RecoveryCurve]) -> NDArray[np.float64]:
    """Best accuracies in draws of questions, the same for all that were asked them, and of seeds, each model's own [draws,
    models]."""
    rng = np.random.default_rng(SEED)
    best = np.empty((RESAMPLES, len(curves)))
    for place, (curve, drawn) in enumerate(zip(curves, draws_of_each(curves, rng), strict=True)):
        seeds = len(curve.hits)
        weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
        by_seed = np.tensordot(curve.hits, drawn, (2, 1))  # [seeds, steps, draws]
        best[:, place] = np.einsum("std,ds->dt", by_seed, weights).max(1)
    return best
