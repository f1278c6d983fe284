"""Is a measurement to be believed: does it tell models that know from models that never did, and does it stay put?"""

import math
from collections.abc import Callable, Sequence

from .intervals import Interval, Z


def auc(knowing: Sequence[float], unknowing: Sequence[float]) -> float:
    """Probability that a model that knows has the higher value than one that does not; equal values count half.

    Example:
        >>> auc([0.9, 0.8], [0.1, 0.8])
        0.875

    Raises:
        ValueError: One of the pools is empty.
    """
    if not knowing or not unknowing:
        raise ValueError("each pool needs at least one model")
    wins = sum((k > u) + (k == u) / 2 for k in knowing for u in unknowing)
    return wins / (len(knowing) * len(unknowing))


def auc_interval(value: float, knowing: int, unknowing: int) -> Interval:
    """95% interval of an AUC from so many models of each kind; wide where models are few, also at 1.

    All true values are in it from which the found one is at most 1.96 of the true value's standard errors away.

    Example:
        >>> low, high = auc_interval(1.0, 5, 5)
        >>> round(low, 2), high
        (0.64, 1.0)

    Source:
        Hanley and McNeil 1982, equation 2, with the pools' mean size in place of each (Newcombe 2006, method 5).
    """

    def away(true: float) -> float:
        return abs(value - true) - Z * math.sqrt(_variance(true, knowing, unknowing))

    return _edge(away, value, 0.0), _edge(away, value, 1.0)


def steadiness(before: float, after: float) -> float:
    """How little a value moved, 0 to 1: 1 where it did not, 0 where it came from 0, went there, or changed its sign.

    Example:
        >>> steadiness(0.4, 0.6)
        0.8

    Source:
        Lee et al. 2026 (arXiv 2605.24614), section 4, on rounding to 4 bits.
    """
    return _alike(before, after)


def same_gain(edited: float, unknowing: float) -> float:
    """How alike two models gain from the same lesson, 0 to 1: 1 where both gain as much.

    Args:
        edited: Value after relearning minus value before.
        unknowing: The same of a model that never knew.

    Source:
        Lee et al. 2026 (arXiv 2605.24614), section 4, on relearning.
    """
    return _alike(edited, unknowing)


def harmonic_mean(values: Sequence[float]) -> float:
    """Of values from 0 to 1; 0 where one of them is."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def _alike(first: float, second: float) -> float:
    both = abs(first) + abs(second)
    return 1.0 if both == 0 else 1 - abs(first - second) / both


def _variance(true: float, knowing: int, unknowing: int) -> float:
    mean = (knowing + unknowing) / 2 - 1
    spread = 1 + mean * (1 - true) / (2 - true) + mean * true / (1 + true)
    return true * (1 - true) * spread / (knowing * unknowing)


def _edge(away: Callable[[float], float], value: float, end: float) -> float:
    """The furthest value towards an end that is not too far away, by bisection."""
    if away(end) <= 0:
        return end
    inside, outside = value, end
    for _ in range(60):
        middle = (inside + outside) / 2
        if away(middle) <= 0:
            inside = middle
        else:
            outside = middle
    return inside
