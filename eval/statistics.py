"""Values with 95% intervals: Wilson for rates, Tango for their paired differences, else bootstrap over items."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..editing.errors import ExciseError

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

    def __post_init__(self) -> None:
        broken = [key for key, total in zip(self.ids, self.totals, strict=True) if not math.isfinite(total)]
        if broken:
            raise ExciseError(
                f"{self.name} on {self.split}: {len(broken)} of {len(self.ids)} items gave no finite number, the first"
                f" {broken[0]}; the model's weights or activations hold NaN or infinity, so it cannot be measured"
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing could be scored, so that there is no value."""
        return sum(self.weights) == 0

    def value(self) -> float:
        """Weighted average over items, in ``unit``."""
        return float(self._finish(np.sum(self.totals) / np.sum(self.weights)))

    def interval(self) -> tuple[float, float]:
        """95% interval over items."""
        # A bootstrap of a rate of 0 or 1 has no width.
        if self._is_rate:
            return wilson(int(sum(self.totals)), len(self.totals))
        return _percentiles(self._resampled())

    def difference(self, base: "Scores") -> tuple[float, tuple[float, float]]:
        """Value minus the base's, with the interval of a paired difference: both answered the same items."""
        assert self.ids == base.ids, "differences need the same items"
        value = self.value() - base.value()
        if self._is_rate and base._is_rate:
            pairs = list(zip(self.totals, base.totals, strict=True))
            return value, tango(pairs.count((1.0, 0.0)), pairs.count((0.0, 1.0)), len(pairs))
        # The same items are drawn for both.
        return value, _percentiles(self._resampled() - base._resampled())

    @property
    def _is_rate(self) -> bool:
        return (
            not self.exponential
            and all(weight == 1 for weight in self.weights)
            and all(total in (0.0, 1.0) for total in self.totals)
        )

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


Z = 1.959964
"""The normal distribution's 97.5% point."""


def tango(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95% score interval of a difference of two rates on the same items (Tango 1998, Statistics in Medicine 17:891).

    It has a width where no item differs, and it covers at small n, where a bootstrap of pairs does neither.

    Args:
        gained: Items that only the first got right.
        lost: Items that only the second got right.
        n: All items.

    Example:
        >>> tango(0, 0, 20)
        (-0.161..., 0.161...)
    """
    difference = (gained - lost) / n

    def is_outside(delta: float) -> bool:
        # The likeliest rate of ``lost`` under this difference, in the paper's closed form.
        a, b, c = 2 * n, -gained - lost + (2 * n - gained + lost) * delta, -lost * delta * (1 - delta)
        rate = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = max(0.0, n * (2 * rate + delta * (1 - delta)))
        return (gained - lost - n * delta) ** 2 > Z * Z * variance

    def limit(outer: float) -> float:
        inner = difference
        if not is_outside(outer):
            return outer
        # Halved until floats are exhausted; the score is monotonic on each side of the difference.
        for _ in range(60):
            middle = (outer + inner) / 2
            outer, inner = (middle, inner) if is_outside(middle) else (outer, middle)
        return inner

    return limit(-1.0), limit(1.0)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927). Unlike a bootstrap, it has a width at 0 and 1 too.

    Example:
        >>> wilson(20, 20)
        (0.83..., 1.0)
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    # At 0 and 1 rounding could leave the proportion itself outside its interval.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def _percentiles(samples: np.ndarray[Any, Any]) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
