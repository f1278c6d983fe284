"""Intervals, computed a second time from the definition: by search in place of closed forms.

Nothing here imports excise: a test that holds excise against it finds what a shared shortcut would hide.
"""

import math


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
