"""Percentile bootstrap, for figures that are no mean of items: a harmonic mean of means, or a ratio of two AUCs."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from .intervals import Interval, numbered
from .ratios import FEWEST_SUBJECTS, RESAMPLES, SEED

Array = NDArray[np.float64]


def percentile_interval(
    groups: Sequence[Sequence[Hashable]], estimate: Callable[[list[Array]], Array]
) -> Interval | None:
    """95% interval by drawing subjects within each group.

    Args:
        groups: Of each group of items, the subject of each item; groups are drawn independently.
        estimate: The value of each draw, from how often each item of each group was drawn [draws, items].

    Returns:
        None where a group has fewer than five subjects, or all draws give the same.

    Example:
        >>> values = np.arange(20.0)
        >>> percentile_interval([range(20)], lambda drawn: drawn[0] @ values / drawn[0].sum(1))
        (7.0..., 12.0...)
    """
    rng = np.random.default_rng(SEED)
    drawn = []
    for group in groups:
        number = numbered(group if len(set(group)) > 1 else range(len(group)))
        count = max(number, default=-1) + 1
        if count < FEWEST_SUBJECTS:
            return None
        drawn.append(rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)[:, number])
    values = estimate(drawn)
    low, high = (float(end) for end in np.percentile(values[np.isfinite(values)], [2.5, 97.5]))
    return (low, high) if high - low > 1e-12 else None
