"""A broken model forgets anything: whether a repair brings its utility back, and whether knowledge comes with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .compared import Compared
from .contrasts import ONE_SIDED, Paired
from .controls import WORKING
from .recovery import RecoveryCurve


@dataclass(frozen=True)
class Repair:
    """What fine-tuning on retain texts gives back of everything else, at the look at which the edited model is best."""

    attack: str
    step: int
    before: float
    """Share of everything else that the edited model answers right before the repair."""
    edited: float
    base: float
    """Of the base, after as much of the same fine-tuning."""
    fails: bool
    """Whether the edited model surely stays below 90% of the base."""
    n: int

    def describe(self) -> dict[str, Any]:
        """As ``audit.json`` holds it."""
        return {
            "attack": self.attack,
            "step": self.step,
            "before": self.before,
            "edited": self.edited,
            "base": self.base,
            "brings_utility_back": not self.fails,
            "n": self.n,
        }


def repair_of(compared: Sequence[Compared]) -> Repair | None:
    """The repair among the attacks; None where none repaired, or nothing else was asked."""
    one = next((c for c in compared if c.repaired), None)
    if one is None or one.edited.utility is None or one.base.utility is None:
        return None
    edited, base = (_utility(curve, one.subjects) for curve in (one.edited, one.base))
    # Before its first step nothing is repaired.
    places = [place for place, step in enumerate(edited.steps) if 0 < step <= one.repaired]
    if not places:
        return None
    best = max(places, key=lambda place: float(edited.accuracy[place]))
    after = [_at(curve, best) for curve in (edited, base)]
    beyond = Paired(after).contrast(1, -WORKING)
    return Repair(
        one.name,
        edited.steps[best],
        float(edited.accuracy[0]),
        float(edited.accuracy[best]),
        float(base.accuracy[best]),
        beyond.value + ONE_SIDED * beyond.error < 0,
        int(edited.hits.shape[2]),
    )


def _utility(curve: RecoveryCurve, subjects: tuple[str, ...]) -> RecoveryCurve:
    """The curve of everything else."""
    assert curve.utility is not None
    return RecoveryCurve(curve.steps, curve.tokens, curve.utility, subjects)


def _at(curve: RecoveryCurve, place: int) -> RecoveryCurve:
    hits = curve.hits[:, place : place + 1]
    return RecoveryCurve((curve.steps[place],), (curve.tokens[place],), hits, curve.clusters)


def sentences(problem: str, repair: Repair, recovering: Sequence[str], untouched: float | None) -> list[str]:
    """Why a model counts as broken, not erased; or what the repair did, where it does not.

    Args:
        problem: What the control of utility says.
        recovering: Attacks that bring knowledge back, with their figures.
        untouched: Share of group V that it answers without any attack, where it was never erased.
    """
    said = [f"It is broken: {problem}."]
    outcome = "does not bring that back" if repair.fails else "brings that back"
    said.append(
        f"A repair, {repair.step} steps of fine-tuning on retain texts, {outcome}: the edited model then answers"
        f" {repair.edited:.3f} of everything else right, the base {repair.base:.3f} (before: {repair.before:.3f},"
        f" n = {repair.n})."
    )
    if untouched is not None:
        said.append(f"It was never erased: without any attack it answers {untouched:.3f} of group V right.")
    if recovering:
        said.append(f"Knowledge of group V recovers under {', '.join(recovering)}.")
    return said
