"""Values with 95% intervals: Wilson for rates, bootstrap over items for everything else."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 2000
"""Bootstrap draws."""
SEED = 0

Better = Literal["higher", "lower", "base"]


@dataclass(frozen=True)
class Scores:
    """One measurement of one model, item by item, so that two models can be compared on the same items."""

    name: str
    split: str
    unit: str
    better: Better
    """Which direction is good; ``base`` if the edit should not change the value."""
    ids: tuple[str, ...]
    totals: tuple[float, ...]
    """Per item: 0 or 1 for rates, summed nats for per-token averages."""
    weights: tuple[float, ...]
    """Per item: 1 for rates, tokens for per-token averages."""
    exponential: bool = False
    """Report exp of the average (perplexity)."""
    skipped: int = 0
    """Number of items left out, such as texts longer than the context."""

    def value(self) -> float:
        """Weighted average over items, in ``unit``."""
        return float(self._finish(np.sum(self.totals) / np.sum(self.weights)))

    def interval(self) -> tuple[float, float]:
        """95% interval over items."""
        shares = not self.exponential and all(weight == 1 for weight in self.weights)
        # A bootstrap of a rate of 0 or 1 has no width.
        if shares and set(self.totals) <= {0.0, 1.0}:
            return wilson(int(sum(self.totals)), len(self.totals))
        return _percentiles(self._resampled())

    def difference(self, base: "Scores") -> tuple[float, tuple[float, float]]:
        """Value minus the base's, with a paired bootstrap interval: the same items are drawn for both."""
        assert self.ids == base.ids, "differences need the same items"
        return self.value() - base.value(), _percentiles(self._resampled() - base._resampled())

    def _resampled(self) -> np.ndarray[Any, Any]:
        n = len(self.totals)
        # How often each item is drawn is all that a mean needs, so draws are counts and the bootstrap is one matrix
        # product. The seed is the same for all models, so that both sides of a difference draw the same items.
        draws = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        weights = draws @ np.asarray(self.weights)
        # With very few items a draw may contain only items of weight 0.
        return self._finish(draws @ np.asarray(self.totals) / np.maximum(weights, 1e-12))

    def _finish(self, average: Any) -> Any:
        return np.exp(average) if self.exponential else average


@dataclass(frozen=True)
class Measurement:
    """One value of one model, as ``eval.json`` holds it."""

    name: str
    split: str
    subject: Literal["base", "edited", "reference"]
    value: float
    unit: str
    better: Better
    n: int
    skipped: int
    ci95: tuple[float, float]
    difference: dict[str, Any] | None = None
    """This value minus the base's, on the same items: ``{"value", "ci95"}``."""


def summarize(
    scores: Scores, subject: Literal["base", "edited", "reference"], base: Scores | None = None
) -> Measurement:
    """Compute the value with its interval, and the difference from ``base`` if it scored the same items."""
    difference = None
    if base is not None and base.ids == scores.ids:
        value, interval = scores.difference(base)
        difference = {"value": value, "ci95": interval}
    return Measurement(
        scores.name,
        scores.split,
        subject,
        scores.value(),
        scores.unit,
        scores.better,
        n=len(scores.ids),
        skipped=scores.skipped,
        ci95=scores.interval(),
        difference=difference,
    )


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927). Unlike a bootstrap, it has a width at 0 and 1 too.

    Example:
        >>> wilson(20, 20)
        (0.83..., 1.0)
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 rounding could leave the proportion itself outside its interval.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def _percentiles(samples: np.ndarray[Any, Any]) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
