"""Intervals, computed a second time from the definition: by search in place of closed forms.

Nothing here imports excise: a test that holds excise against it finds what a shared shortcut would hide.
"""

import math
from collections.abc import Callable


def paired_rate_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """95% limits of a difference of paired rates (Tango 1998), by search: the differences that a score test keeps.

    Args:
        gained: Items that only the first got right.
        lost: Items that only the second got right.
    """

    def statistic(delta: float) -> float:
        # The likelihood's maximum over the rate of ``lost``, at this difference: by a search of its own.
        low, high = max(0.0, -delta), (1 - delta) / 2

        def slope(rate: float) -> float:
            parts = [gained / (rate + delta) if gained else 0.0, lost / rate if lost else 0.0]
            return sum(parts) - 2 * (n - gained - lost) / (1 - 2 * rate - delta)

        for _ in range(200):
            middle = (low + high) / 2
            try:
                low, high = (middle, high) if slope(middle) > 0 else (low, middle)
            except ZeroDivisionError:
                break
        variance = n * (2 * low + delta * (1 - delta))
        distance = gained - lost - n * delta
        return distance / math.sqrt(variance) if variance > 1e-14 else math.copysign(math.inf, distance or 1.0)

    def crossing(outside: float, inside: float) -> float:
        if abs(statistic(outside)) <= 1.959964:
            return outside
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if abs(statistic(middle)) > 1.959964 else (outside, middle)
        return (outside + inside) / 2

    middle = (gained - lost) / n
    return crossing(-1.0, middle), crossing(1.0, middle)


def items_in_effect(values: list[float], subjects: list[str]) -> float:
    """How many independent items tell as much of the mean: two variances, each from its definition, and Student's t.

    Source: Rao and Scott 1992; Korn and Graubard 1998.
    """
    n, mean = len(values), sum(values) / len(values)
    names = sorted(set(subjects))
    independent = sum((value - mean) ** 2 for value in values) / n / n
    if independent == 0:
        return len(names)
    sums = []
    for name in names:
        sums.append(sum(value - mean for value, subject in zip(values, subjects, strict=True) if subject == name))
    clustered = len(names) / (len(names) - 1) * sum(one**2 for one in sums) / n / n
    return n / max(1.0, clustered / independent) * (1.959964 / student(len(names) - 1)) ** 2


def student(freedom: int) -> float:
    """The 97.5% point of Student's t, by adding up its density."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    def density(t: float) -> float:
        return math.exp(log_scale - (freedom + 1) / 2 * math.log1p(t * t / freedom))

    # Simpson's rule, one step after another, until 47.5% lie between 0 and t.
    width, t, share = 1e-3, 0.0, 0.0
    while share < 0.475:
        share += width / 6 * (density(t) + 4 * density(t + width / 2) + density(t + width))
        t += width
    return t


def ratio_interval(
    totals: list[float], weights: list[float], subjects: list[str], draws: list[list[int]]
) -> tuple[float, float]:
    """95% interval of a ratio of sums of which no total is negative.

    On each side the wider one of Student's t and the bootstrap-t (Hall 1988), with the error of a jackknife; above, the
    bootstrap-t of the logarithm too, as much wider as Student's t is than the normal distribution.

    Args:
        draws: For each draw, how often each subject is in it, in the order in which subjects appear.
    """
    names = list(dict.fromkeys(subjects))
    sums = [
        [sum(v for v, s in zip(column, subjects, strict=True) if s == name) for column in (totals, weights)]
        for name in names
    ]

    def estimate(drawn: list[list[float]]) -> tuple[float, float]:
        total, weight = sum(pair[0] for pair in drawn), sum(pair[1] for pair in drawn)
        squares = sum(((pair[0] - total / weight * pair[1]) / weight) ** 2 for pair in drawn)
        return total / weight, math.sqrt(squares * len(names) / (len(names) - 1))

    value, t = estimate(sums)[0], student(len(names) - 1)
    error = _jackknife(sums, value, lambda left: estimate(left)[0])
    studentized, of_logarithm = [], []
    for counts in draws:
        one, of_it = estimate([pair for pair, count in zip(sums, counts, strict=True) for _ in range(count)])
        if of_it > 1e-6 * error:
            studentized.append((one - value) / of_it)
            of_logarithm.append((math.log(one) - math.log(value)) / (of_it / one))
    low, high = (_quantile(sorted(studentized), share) for share in (0.025, 0.975))
    above = max(t, -_quantile(sorted(of_logarithm), 0.025) * t / 1.959964)
    return (
        value - max(t, high) * error,
        max(value + max(t, -low) * error, math.exp(math.log(value) + above * error / value)),
    )


def perplexity_difference(
    first: tuple[list[float], list[float]],
    second: tuple[list[float], list[float]],
    subjects: list[str],
    draws: list[list[int]],
) -> tuple[float, float]:
    """95% interval of a difference of exp of two ratios of sums on the same items, each ``(totals, weights)``.

    The error within a draw is the sum of squares of what each subject moves the difference by, from the derivative.
    """
    names = list(dict.fromkeys(subjects))
    columns = [*first, *second]
    sums = [[sum(v for v, s in zip(c, subjects, strict=True) if s == name) for c in columns] for name in names]

    def estimate(drawn: list[list[float]]) -> tuple[float, float]:
        a, b, c, d = (sum(row[place] for row in drawn) for place in range(4))
        left, right = math.exp(a / b), math.exp(c / d)
        moved = [left * (row[0] - a / b * row[1]) / b - right * (row[2] - c / d * row[3]) / d for row in drawn]
        return left - right, math.sqrt(sum(one**2 for one in moved) * len(names) / (len(names) - 1))

    value, t = estimate(sums)[0], student(len(names) - 1)
    error = _jackknife(sums, value, lambda left: estimate(left)[0])
    studentized = []
    for counts in draws:
        one, of_it = estimate([row for row, count in zip(sums, counts, strict=True) for _ in range(count)])
        if of_it > 1e-6 * error:
            studentized.append((one - value) / of_it)
    low, high = (_quantile(sorted(studentized), share) for share in (0.025, 0.975))
    return value - max(t, high) * error, value + max(t, -low) * error


def _jackknife(rows: list[list[float]], value: float, estimate: Callable[[list[list[float]]], float]) -> float:
    """Standard error from what the estimate becomes without each row."""
    without = [estimate(rows[:place] + rows[place + 1 :]) for place in range(len(rows))]
    return math.sqrt((len(rows) - 1) / len(rows) * sum((one - value) ** 2 for one in without))


def _quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
