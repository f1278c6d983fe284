"""Values of measurements with 95% intervals, and their differences from the base on the same items."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..editing.errors import ExciseError
from .intervals import Difference, Interval, numbered, paired_rate_difference, rate_interval
from .ratios import FEWEST_SUBJECTS, ratio_difference, ratio_interval

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
    clusters: tuple[str, ...] = ()
    """The subject of each item; without them items count as independent."""
    as_one: float = 0.0
    """Of a divergence: the mean probability that the base gives to the tokens that were counted as one. Above 0, the value
    is a lower bound."""

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

    @property
    def subjects(self) -> int:
        """How many subjects something was counted of; items where none are known, or one alone."""
        return int(np.count_nonzero(self._by_subject(self.weights)))

    @property
    def has_too_few(self) -> bool:
        """Whether subjects are too few for an interval. A rate has one at any number: it is bounded."""
        return not self._is_rate and self.subjects < FEWEST_SUBJECTS

    @property
    def holding_half(self) -> int:
        """Subjects that hold half of all weight, or of all that was summed up, whichever are fewer.

        Where few do, another sample could hold much more or less of it, and no interval knows. Of lognormal values they
        are 16% of the subjects at sigma 1, and 7% at sigma 1.5.
        """
        columns = [self.weights]
        if not self._is_rate and (min(self.totals) >= 0 or max(self.totals) <= 0) and any(self.totals):
            columns.append(tuple(map(abs, self.totals)))
        counts = []
        for column in columns:
            largest = np.sort(self._by_subject(column))[::-1]
            counts.append(1 + int(np.searchsorted(largest.cumsum(), largest.sum() / 2)))
        return min(counts)

    def _by_subject(self, column: Sequence[float]) -> NDArray[np.float64]:
        known = self.clusters if len(set(self.clusters)) > 1 else range(len(self.ids))
        return np.asarray(np.bincount(numbered(known), weights=np.asarray(column, dtype=float)), dtype=np.float64)

    def value(self) -> float:
        """Weighted average over items, in ``unit``."""
        average = sum(self.totals) / sum(self.weights)
        return math.exp(average) if self.exponential else average

    def interval(self) -> Interval | None:
        """95% interval over items, or over subjects where they are known; None where these are too few or all alike."""
        if self._is_rate:
            return rate_interval(self.totals, self.clusters)
        interval = ratio_interval(self.totals, self.weights, self.clusters, exponential=self.exponential)
        if interval is None:
            return None
        # What no item passes, such as 0 of a divergence, 1 of a perplexity or of a share, no average passes either.
        edge = 1.0 if self.exponential else 0.0
        low = max(edge, interval[0]) if min(self.totals) >= 0 else interval[0]
        high = min(edge, interval[1]) if max(self.totals) <= 0 else interval[1]
        if self.unit == "AUC":
            return max(0.0, low), min(1.0, high)
        return low, min(1.0, high) if self.unit.startswith("share") else high

    def difference(self, base: "Scores") -> Difference:
        """Value minus the base's, with the interval of a paired difference: both answered the same items."""
        assert self.ids == base.ids, "differences need the same items"
        if self._is_rate and base._is_rate:
            return paired_rate_difference(self.totals, base.totals, self.clusters)
        pair = (self.totals, self.weights), (base.totals, base.weights)
        return ratio_difference(*pair, self.clusters, exponential=self.exponential)

    @property
    def _is_rate(self) -> bool:
        return (
            not self.exponential
            and all(weight == 1 for weight in self.weights)
            and all(total in (0.0, 1.0) for total in self.totals)
        )


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
    ci95: Interval | None
    """None where the items tell of none: fewer than five subjects, or texts that all gave the same."""
    difference: dict[str, Any] | None = None
    """This value minus the base's, on the same items: ``{"value", "ci95", "p"}``; files of earlier versions have no
    p."""


def summarize(
    scores: Scores, subject: Literal["base", "edited", "reference"], base: Scores | None = None
) -> Measurement:
    """Compute the value with its interval, and the difference from ``base`` if it scored the same items."""
    difference = None
    if base is not None and base.ids == scores.ids:
        difference = asdict(scores.difference(base))
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
