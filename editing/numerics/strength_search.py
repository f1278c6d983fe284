"""The largest strength whose divergence stays within a budget: bracket it, then close in on it.

For small strengths a divergence grows with the square of the strength, because it and its slope are 0 at 0. That gives
the first guess; later ones lie on the power law through both ends of the bracket.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

LOWEST_SHARE = 0.95
"""A strength is found if its divergence is at least this share of the budget, and at most the budget."""
AIM = 0.975
MOST_TRIES = 30
WIDEST = 8.0
"""Factor by which one guess moves at most, while the bracket has one end only."""
CLOSEST = 1.0005
"""Ends of a bracket that lie closer than this factor have nothing in between."""

Outcome = Literal["within", "whole", "steps", "nothing"]
"""``within``: found. ``whole``: the strongest allowed stays below the budget. ``steps``: the divergence jumps over the
range, because weights change in steps of their type. ``nothing``: what stays within the budget changes nothing."""


@dataclass(frozen=True)
class Try:
    """One strength and what it did."""

    strength: float
    divergence: float


@dataclass(frozen=True)
class StrengthFound:
    """The result of a search for a strength."""

    strength: float
    divergence: float
    outcome: Outcome
    tries: tuple[Try, ...]
    """In the order in which they were made."""

    @property
    def is_monotone(self) -> bool:
        """Whether a stronger try never moved the model less, beyond 1%."""
        ordered = [one.divergence for one in sorted(self.tries, key=lambda one: one.strength)]
        return all(stronger >= 0.99 * weaker for weaker, stronger in pairwise(ordered))

    @property
    def least(self) -> float:
        """The smallest divergence of a try that changed something."""
        return min((one.divergence for one in self.tries if one.divergence > 0), default=0.0)


def strength_within(budget: float, divergence: Callable[[float], float], most: float = 1.0) -> StrengthFound:
    """The strength, at most ``most``, whose divergence lies between 0.95 and 1 times the budget.

    Args:
        budget: More than 0, in the units of ``divergence``.
        divergence: What a strength does; 0 where it changes nothing, infinite or NaN where it breaks the model.
        most: The strongest that is allowed.

    Example:
        >>> found = strength_within(0.01, lambda strength: 0.3 * strength**2)
        >>> round(found.strength, 2), len(found.tries)
        (0.18, 2)
    """
    tries: list[Try] = []
    low, high, strength = Try(0.0, 0.0), None, min(1.0, most)
    while True:
        value = divergence(strength)
        latest = Try(strength, value if math.isfinite(value) else math.inf)
        tries.append(latest)
        if LOWEST_SHARE * budget <= latest.divergence <= budget:
            return StrengthFound(latest.strength, latest.divergence, "within", tuple(tries))
        same_side = len(tries) > 2 and (tries[-2].divergence > budget) == (latest.divergence > budget)
        if latest.divergence > budget:
            high = latest
        else:
            low = latest
        if high is None and strength >= most:
            return StrengthFound(low.strength, low.divergence, "whole", tuple(tries))
        if len(tries) >= MOST_TRIES or (high and low.strength and high.strength < CLOSEST * low.strength):
            outcome: Outcome = "steps" if low.divergence else "nothing"
            return StrengthFound(low.strength, low.divergence, outcome, tuple(tries))
        strength = min(most, _next(tries, low, high, AIM * budget, halve=same_side))


def _next(tries: list[Try], low: Try, high: Try | None, aim: float, *, halve: bool) -> float:
    """The next strength to try."""
    if high is None:
        step = math.sqrt(aim / low.divergence) if low.divergence else WIDEST
        return low.strength * min(WIDEST, max(1.01, step))
    if not low.strength:
        if not math.isfinite(high.divergence):
            return high.strength / WIDEST
        power = _power(tries[-1], tries[-2]) if len(tries) > 1 and math.isfinite(tries[-2].divergence) else 2.0
        return high.strength * min(0.9, (aim / high.divergence) ** (1 / min(8.0, max(0.25, power))))
    middle = math.sqrt(low.strength * high.strength)
    # One end that stays would let the power law creep along; halving closes in on any curve.
    if halve or not low.divergence or not math.isfinite(high.divergence):
        return middle
    guess = low.strength * (aim / low.divergence) ** (1 / _power(low, high))
    return guess if low.strength < guess < high.strength else middle


def _power(one: Try, other: Try) -> float:
    """The exponent of the power law through two tries."""
    return math.log(one.divergence / other.divergence) / math.log(one.strength / other.strength)
