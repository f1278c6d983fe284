"""Figures that a search goes by, their names, and objectives and guards made of them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...editing.errors import RequestError, nearest
from ...eval.measurements import MEASUREMENTS

CHANGE = ".change"
"""At the end of a figure's name: the value less the base's."""
LIKELIHOOD = "behaviour.likelihood"
SHORT: dict[str, str] = {
    "forget": "multiple_choice.forget_V",
    "forget.V.accuracy": "multiple_choice.forget_V",
    "forget.T.accuracy": "multiple_choice.forget_T",
    "neighbour": "multiple_choice.neighbour.change",
    "rest": "multiple_choice.retain.change",
    "kl": "kl_from_base.retain",
    "kl.replies": "kl_from_base.neutral",
    "behaviour": "behaviour_rate.concept",
    "declines.elsewhere": "behaviour_rate.neutral.change",
    "degenerate": "degenerate_share.concept.change",
}
"""Short names, each with the measurement and split that it stands for."""
OWNERS: dict[str, str] = {
    "multiple_choice_margin": "multiple_choice", "cloze_rank": "cloze", "cloze_exact": "cloze",
    "cloze_probability": "cloze", "truth_ratio": "answer_probability", "repetition": "distinct_2",
    "on_topic": "distinct_2",
}  # fmt: skip
"""Measurements that the function of another row measures too."""
LIKELIHOODS = (
    "multiple_choice", "multiple_choice_margin", "cloze", "cloze_rank", "cloze_exact", "cloze_probability",
    "answer_probability", "truth_ratio", "extraction_strength", "kl_from_base", "perplexity",
)  # fmt: skip
"""Measurements that generate nothing: a forward over known tokens each."""
GENERATED = (
    "exact_answer",
    "behaviour_rate",
    "learned_rate",
    "degenerate_share",
    "distinct_2",
    "repetition",
    "on_topic",
)
"""Measurements that read greedy replies."""
SHARES = ("exact_answer", "behaviour_rate", "learned_rate", "degenerate_share")
"""Figures between 0 and 1."""
Way = Literal["min", "max"]


@dataclass(frozen=True)
class Figure:
    """One number that is known of each trial."""

    name: str
    """As it was asked for."""
    measurement: str
    split: str
    change: bool = False

    @property
    def generates(self) -> bool:
        """Whether it needs replies."""
        return self.measurement in GENERATED

    @property
    def stand_in(self) -> "Figure":
        """What tells nearly the same without a reply, by which hopeless trials are left early."""
        if self.measurement in ("behaviour_rate", "exact_answer") and self.split == "concept":
            return Figure(LIKELIHOOD, LIKELIHOOD, "concept")
        return self


@dataclass(frozen=True)
class Objective:
    """A figure and the way it should go."""

    figure: Figure
    way: Way

    @property
    def name(self) -> str:
        return f"{self.figure.name}:{self.way}"

    def signed(self, value: float) -> float:
        """The value as something to be small; of a divergence its logarithm, because it spans orders of magnitude."""
        if self.figure.measurement == "kl_from_base" and not self.figure.change:
            value = math.log(max(value, 1e-12))
        return value if self.way == "min" else -value

    @property
    def bound(self) -> float:
        """The best value that a share of replies can have; the worst is no news where it is not known."""
        if self.figure.measurement not in SHARES or self.figure.change:
            return -math.inf if self.way == "min" else math.inf
        return 0.0 if self.way == "min" else 1.0

    def stand_in(self) -> "Objective | None":
        """The same without replies; None where nothing stands in for it."""
        other = self.figure.stand_in
        if other.generates:
            return None
        # Less of the base's own replies is more of right answers.
        turned = other is not self.figure and self.figure.measurement == "exact_answer"
        return Objective(other, ("min" if self.way == "max" else "max") if turned else self.way)


@dataclass(frozen=True)
class Guard:
    """What no trial may cost: a figure and its limit."""

    figure: Figure
    at_least: bool
    limit: float

    @property
    def name(self) -> str:
        return f"{self.figure.name}{'>=' if self.at_least else '<='}{self.limit:g}"

    def excess(self, value: float) -> float:
        """How far a value breaks the guard; at most 0 where it keeps it."""
        return self.limit - value if self.at_least else value - self.limit


def figure(name: str) -> Figure:
    """A figure by its name: a short one, or MEASUREMENT.SPLIT, with .change at the end for the difference from the base.

    Raises:
        RequestError: There is none.
    """
    whole = SHORT.get(name) or SHORT.get(name.removesuffix(CHANGE), name.removesuffix(CHANGE)) + (
        CHANGE if name.endswith(CHANGE) else ""
    )
    if name == LIKELIHOOD:
        return Figure(name, LIKELIHOOD, "concept")
    measurement, _, split = whole.replace(CHANGE, "").partition(".")
    known = MEASUREMENTS.get(measurement)
    if measurement not in (*LIKELIHOODS, *GENERATED) or known is None or split not in known.splits:
        every = [
            *SHORT,
            LIKELIHOOD,
            *(f"{key}.{one}" for key in (*LIKELIHOODS, *GENERATED) for one in MEASUREMENTS[key].splits),
        ]
        raise RequestError(
            f"no figure {name!r:.80}{nearest(name, every)}; figures: {', '.join(SHORT)}, or MEASUREMENT.SPLIT such as"
            " cloze.forget_V, with .change at the end for the difference from the base"
        )
    return Figure(name, measurement, split, whole.endswith(CHANGE))


def objective(text: str) -> Objective:
    """An objective such as ``forget:min``.

    Raises:
        RequestError: It is none.
    """
    name, colon, way = text.strip().rpartition(":")
    if not colon or way not in ("min", "max"):
        raise RequestError(
            f"--objective {text:.80}: got no way to go; allowed: FIGURE:min or FIGURE:max, e.g. forget:min"
        )
    return Objective(figure(name), "min" if way == "min" else "max")


def guard(text: str) -> Guard:
    """A guard such as ``rest>=-0.02``.

    Raises:
        RequestError: It is none.
    """
    match = re.fullmatch(r"\s*([A-Za-z_.0-9]+)\s*(>=|<=)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*", text)
    if not match:
        raise RequestError(f"--guard {text:.80}: allowed: FIGURE>=NUMBER or FIGURE<=NUMBER, e.g. 'rest>=-0.02'")
    try:
        limit = float(match[3])
    except ValueError as error:
        raise RequestError(f"--guard {text:.80}: {match[3]} is not a number") from error
    return Guard(figure(match[1]), match[2] == ">=", limit)


def dominated(one: Sequence[float], others: Sequence[Sequence[float]], margins: Sequence[float]) -> bool:
    """Whether another is better by more than a margin in every objective; all are to be small."""
    return any(
        all(ours > theirs + margin for ours, theirs, margin in zip(one, other, margins, strict=True))
        for other in others
    )


def front(points: Mapping[int, Sequence[float]]) -> list[int]:
    """The trials that no other beats in one objective without losing in another; all are to be small."""

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

    return [number for number, values in points.items() if not any(beats(other, values) for other in points.values())]
