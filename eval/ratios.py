"""95% intervals of means, of ratios of sums, and of their differences on the same items; drawn subject by subject."""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from .intervals import Difference, Interval, numbered, student, within

RESAMPLES = 2000
"""Bootstrap draws."""
SEED = 0
FEWEST_DRAWN = 5
"""Subjects below which draws repeat each other so often that Student's t alone is taken."""
Array = NDArray[np.float64]


def ratio_interval(
    totals: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable] = (), *, exponential: bool = False
) -> Interval | None:
    """95% interval of a ratio of sums, such as a mean; None where items are one, or all the same.

    Args:
        exponential: Of exp of the ratio.
    """
    measured = _Sums([totals, weights], clusters, _ratio)
    if measured.error == 0:
        return None
    low, high = measured.ends()
    return (math.exp(low), math.exp(min(high, 700.0))) if exponential else (low, high)


def ratio_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    clusters: Sequence[Hashable] = (),
    *,
    exponential: bool = False,
) -> Difference:
    """Difference of two ratios of sums, each ``(totals, weights)``, on the same items.

    Args:
        exponential: Of exp of each ratio.
    """
    measured = _Sums([*first, *second], clusters, _exponential_difference if exponential else _difference)
    if measured.error == 0:
        return Difference(measured.value, None, 1.0)
    p = 1 - within(math.atan(abs(measured.value / measured.error) / math.sqrt(measured.freedom)), measured.freedom)
    return Difference(measured.value, measured.ends(), p)


Estimator = Callable[[Array], tuple[Array, Array]]
"""From sums [draws, columns]: the value of each draw, and its gradient [draws, columns]."""


class _Sums:
    """A function of sums over subjects that only their ratios matter to, with its standard error by linearization."""

    def __init__(self, columns: Sequence[Sequence[float]], clusters: Sequence[Hashable], estimate: Estimator):
        self.estimate = estimate
        number = numbered(clusters) if len(set(clusters)) > 1 else list(range(len(columns[0])))
        self.sums = np.stack([np.bincount(number, weights=np.asarray(c, dtype=float)) for c in columns], 1)
        self.freedom = len(self.sums) - 1
        values, errors = self._of(np.ones((1, len(self.sums))))
        self.value = float(values[0])
        # What is left of equal items is rounding.
        scale = max(abs(self.value), float(np.abs(columns[0]).max()) / max(1e-300, float(np.mean(columns[1]))))
        self.error = float(errors[0]) if errors[0] > 1e-9 * scale else 0.0

    def ends(self) -> Interval:
        """Student's t and the bootstrap-t (Hall 1988): on each side the wider one, which covers skewed values too."""
        widest = student(self.freedom)
        below = above = widest
        if self.freedom + 1 >= FEWEST_DRAWN:
            n = len(self.sums)
            draws = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
            values, errors = self._of(draws.astype(float))
            # A draw of nothing but equal items has no error of its own, and one of weight 0 no value.
            usable = np.isfinite(values) & (errors > 1e-6 * self.error)
            low, high = np.percentile((values - self.value)[usable] / errors[usable], [2.5, 97.5])
            below, above = max(widest, float(high)), max(widest, -float(low))
        return self.value - below * self.error, self.value + above * self.error

    def _of(self, draws: Array) -> tuple[Array, Array]:
        n, columns = self.sums.shape
        products = (self.sums[:, :, None] * self.sums[:, None, :]).reshape(n, columns * columns)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values, gradient = self.estimate(draws @ self.sums)
            squares = (draws @ products).reshape(-1, columns, columns)
            variance = np.einsum("di,dij,dj->d", gradient, squares, gradient) * n / max(1, n - 1)
        return values, np.sqrt(np.maximum(np.nan_to_num(variance), 0.0))


def _ratio(sums: Array) -> tuple[Array, Array]:
    ratio = sums[:, 0] / sums[:, 1]
    return ratio, np.stack([1 / sums[:, 1], -ratio / sums[:, 1]], 1)


def _difference(sums: Array) -> tuple[Array, Array]:
    (first, of_first), (second, of_second) = _ratio(sums[:, :2]), _ratio(sums[:, 2:])
    return first - second, np.concatenate([of_first, -of_second], 1)


def _exponential_difference(sums: Array) -> tuple[Array, Array]:
    (first, of_first), (second, of_second) = _ratio(sums[:, :2]), _ratio(sums[:, 2:])
    first, second = np.exp(first), np.exp(second)
    return first - second, np.concatenate([of_first * first[:, None], -of_second * second[:, None]], 1)
