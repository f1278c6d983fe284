"""95% intervals of means, of ratios of sums, and of their differences on the same items; drawn subject by subject.

By simulation (``benchmarks/intervals.py``) they hold the truth in 92% of samples or more from 5 subjects on, where values
are skewed no more than lognormal ones of sigma 1. For heavier tails no method promises that without a model of the tail:
most small samples miss the few texts that decide. ``Scores.holding_half`` tells where few do.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .intervals import Difference, Interval, Z, numbered, student, within

RESAMPLES = 2000
"""Bootstrap draws."""
SEED = 0
FEWEST_SUBJECTS = 5
"""Subjects below which there is no interval: draws repeat each other, and Student's t alone misses skewed values."""
Array = NDArray[np.float64]


def ratio_interval(
    totals: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable] = (), *, exponential: bool = False
) -> Interval | None:
    """95% interval of a ratio of sums, such as a mean; None where subjects are fewer than five, or all the same.

    Args:
        totals: One value an item, such as nats.
        weights: One an item, such as tokens.
        clusters: The subject of each item; without them, or where all share one, items are independent.
        exponential: Of exp of the ratio.

    Example:
        >>> ratio_interval([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
        (1.03..., 8.2...)
    """
    measured = _Sums([totals, weights], clusters, _ratio)
    if not measured.tells:
        return None
    if exponential:
        low, high = measured.ends()
        return math.exp(low), _power(high)
    return measured.ends(positive=min(totals) >= 0)


def ratio_difference(
    first: Sequence[Sequence[float]],
    second: Sequence[Sequence[float]],
    clusters: Sequence[Hashable] = (),
    *,
    exponential: bool = False,
) -> Difference:
    """Difference of two ratios of sums, each ``(totals, weights)``, on the same items.

    Args:
        clusters: The subject of each item; without them, or where all share one, items are independent.
        exponential: Of exp of each ratio.
    """
    measured = _Sums([*first, *second], clusters, _exponential_difference if exponential else _difference)
    if not measured.tells:
        return Difference(measured.value, None, 1.0)
    p = 1 - within(math.atan(abs(measured.value / measured.error) / math.sqrt(measured.freedom)), measured.freedom)
    return Difference(measured.value, measured.ends(), p)


Estimator = Callable[[Array], tuple[Array, Array]]
"""From sums [draws, columns]: the value of each draw, and its gradient [draws, columns]."""


class _Sums:
    """A function of sums over subjects that only their ratios matter to, with its standard error.

    The error is that of a jackknife which leaves out a subject at a time. With subjects of one size it equals the
    linearized one; where one subject holds much of the weight, that one is too small.

    Source: MacKinnon, Nielsen and Webb 2023 (Journal of Econometrics 232:272), who call it CV3.
    """

    def __init__(self, columns: Sequence[Sequence[float]], clusters: Sequence[Hashable], estimate: Estimator):
        self.estimate = estimate
        number = numbered(clusters) if len(set(clusters)) > 1 else list(range(len(columns[0])))
        sums = np.stack([np.bincount(number, weights=np.asarray(c, dtype=float)) for c in columns], 1)
        # A subject of which nothing was counted tells nothing.
        self.sums = sums[sums.any(1)]
        n = len(self.sums)
        self.freedom = n - 1
        values, errors = self._of(np.ones((1, n)))
        self.value, self.linearized = float(values[0]), float(errors[0])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            left_out, _ = estimate(self.sums.sum(0) - self.sums)
            self.error = math.sqrt(self.freedom / max(1, n) * float(((left_out - self.value) ** 2).sum()))
        # What is left of equal items is rounding.
        scale = max(abs(self.value), float(np.abs(columns[0]).max()) / max(1e-300, float(np.mean(columns[1]))))
        self.tells = (
            n >= FEWEST_SUBJECTS and math.isfinite(self.error) and min(self.linearized, self.error) > 1e-9 * scale
        )

    def ends(self, *, positive: bool = False) -> Interval:
        """Student's t and the bootstrap-t (Hall 1988): on each side the wider one, which covers skewed values too.

        Few samples of positive, skewed values hold one of the large ones, so the upper end goes by the bootstrap-t of the
        logarithm too (Tibshirani 1988, Biometrika 75:433), as much wider as Student's t is than the normal distribution.
        """
        n, t = len(self.sums), student(self.freedom)
        values, errors = self._of(_draws(n))
        # A draw of nothing but equal items has no error of its own, and one of weight 0 no value.
        usable = np.isfinite(values) & (errors > 1e-6 * self.linearized)
        values, errors = values[usable], errors[usable]
        low, high = np.percentile((values - self.value) / errors, [2.5, 97.5])
        ends = self.value - max(t, float(high)) * self.error, self.value + max(t, -float(low)) * self.error
        if not positive:
            return ends
        low = np.percentile(np.log(values / self.value) * values / errors, 2.5)
        return ends[0], max(ends[1], self.value * _power(t * max(1.0, -float(low) / Z) * self.error / self.value))

    def _of(self, draws: Array) -> tuple[Array, Array]:
        n, columns = self.sums.shape
        products = (self.sums[:, :, None] * self.sums[:, None, :]).reshape(n, columns * columns)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            values, gradient = self.estimate(draws @ self.sums)
            squares = (draws @ products).reshape(-1, columns, columns)
            variance = np.einsum("di,dij,dj->d", gradient, squares, gradient) * n / max(1, n - 1)
        return values, np.sqrt(np.maximum(np.nan_to_num(variance), 0.0))


@lru_cache(maxsize=1)
def _draws(n: int) -> Array:
    """How often each of n subjects is in each draw [draws, n]; base, edited and their difference have the same n."""
    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def _power(exponent: float) -> float:
    """e to the exponent, without an overflow."""
    return math.exp(min(exponent, 700.0))


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
