"""95% intervals of rates and of their differences on the same items, and how many items there are in effect.

Items of one subject tell less than as many items of different ones, so a rate of such items counts as one of fewer.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np

LEVEL = 0.05
"""Chance of any false difference among those that are tested together."""
Z = 1.959964
"""The normal distribution's 97.5% point."""
Interval = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """A value minus another on the same items."""

    value: float
    ci95: Interval | None
    """None where the items tell nothing of how far it may be off."""
    p: float
    """Of the hypothesis that there is no difference; 1 where there is no interval."""


def holm(p_values: Mapping[Key, float], level: float = LEVEL) -> list[Key]:
    """The hypotheses that are refused when all are tested together (Holm 1979), in the order given.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.2})
        ['a']
    """
    refused: set[Key] = set()
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        if p_values[name] > level / (len(p_values) - rank):
            break
        refused.add(name)
    return [name for name in p_values if name in refused]


def at_most_by_chance(right: int, chances: Sequence[float]) -> float:
    """Probability that independent guesses, each right with its own chance, get at most so many right; exact.

    Example:
        >>> at_most_by_chance(0, [0.5, 0.25])
        0.375
    """
    shares = np.ones(1)
    for chance in chances:
        shares = np.convolve(shares, [1 - chance, chance])
    return float(min(1.0, shares[: right + 1].sum()))


def wilson(successes: float, n: float) -> Interval:
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


def tango(gained: float, lost: float, n: float) -> Interval:
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

    # The score is monotonic on each side of the difference.
    low, high = (boundary(is_outside, difference, end) for end in (-1.0, 1.0))
    return -1.0 if low is None else low, 1.0 if high is None else high


def boundary(is_outside: Callable[[float], bool], inner: float, outer: float) -> float | None:
    """Where a test begins to refuse on the way from a value that it keeps; None where it keeps the outer one too."""
    if not is_outside(outer):
        return None
    # Halved until floats are exhausted.
    for _ in range(60):
        middle = (inner + outer) / 2
        inner, outer = (inner, middle) if is_outside(middle) else (middle, outer)
    return inner


def rate_interval(values: Sequence[float], clusters: Sequence[Hashable] = ()) -> Interval:
    """Wilson's interval of a mean of values between 0 and 1, with as many items as the subjects make of them.

    By simulation it holds the truth in 93% of samples or more where subjects have about as many items each. Where 12 to 20
    subjects have 1 to 11 items each, and those of a subject agree much (a correlation of 0.5), it is 89 to 92%.

    Args:
        clusters: The subject of each item; without them items are independent.
    """
    n = effective_size(values, clusters)
    return wilson(sum(values) / max(1, len(values)) * n, n)


def paired_rate_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] = ()
) -> Difference:
    """Difference of two rates on the same items, with Tango's interval and McNemar's test on the effective number.

    Source: Yang, Sun and Hardin 2012 (Pharmaceutical Statistics 11:386), who scale the variance in the same way.
    """
    changes = [a - b for a, b in zip(first, second, strict=True)]
    n = effective_size(changes, clusters)
    scale = n / len(changes)
    gained, lost = changes.count(1.0) * scale, changes.count(-1.0) * scale
    p = 2 * NormalDist().cdf(-abs(gained - lost) / math.sqrt(gained + lost)) if gained + lost else 1.0
    return Difference(sum(changes) / len(changes), tango(gained, lost, n), p)


def effective_size(values: Sequence[float], clusters: Sequence[Hashable] = ()) -> float:
    """How many independent items tell as much of a mean as these do.

    The number of items is divided by the design effect, which is the variance of a ratio of sums by subject over that of
    independent items, and by what few subjects leave unknown of it. Where all values are the same there is no variance
    to compare, and each subject counts once.

    Source: Rao and Scott 1992 (Biometrics 48:577); Korn and Graubard 1998 (Survey Methodology 24:193).

    Args:
        clusters: The subject of each item; without them, or where all share one, items are independent.
    """
    n, sizes = len(values), np.unique(np.asarray(numbered(clusters)), return_counts=True)[1] if clusters else ()
    if len(sizes) in (0, 1, n):
        return float(n)
    array = np.asarray(values, dtype=float)
    independent = float(((array - array.mean()) ** 2).sum())
    if independent == 0:
        return float(len(sizes))
    left = np.bincount(numbered(clusters), weights=array - array.mean())
    effect = float((left**2).sum()) * len(sizes) / (len(sizes) - 1) / independent
    return n / max(1.0, effect) * (Z / student(len(sizes) - 1)) ** 2


def widening(clusters: Sequence[Hashable], n: int) -> float:
    """By how much a bootstrap by subject must be widened for as few subjects as there are."""
    count = len(set(clusters))
    return student(count - 1) / Z if 1 < count < n else 1.0


@lru_cache(maxsize=256)
def student(freedom: int) -> float:
    """The 97.5% point of Student's t distribution.

    Example:
        >>> student(4)
        2.776...
    """
    if freedom > 2000:
        return Z
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def within(angle: float, freedom: int) -> float:
    """Probability that Student's t lies within +-tan(angle) sqrt(freedom).

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    if freedom > 2000:
        return 1 - 2 * NormalDist().cdf(-math.tan(angle) * math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def numbered(clusters: Sequence[Hashable]) -> list[int]:
    """The subjects counted from 0, in the order in which they appear."""
    places: dict[Hashable, int] = {}
    return [places.setdefault(cluster, len(places)) for cluster in clusters]
