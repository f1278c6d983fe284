"""The removal control of an audit: knowledge that was taken out for certain, and whether attacks seem to find it.

It is judged by the rule by which an edited model recovers, and decides no verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .compared import Compared
from .controls import KNOWN, WORKING, is_broken
from .locked import UNATTACKED, attacks_on_control
from .reasons import show
from .recovery import RecoveryCurve
from .verdict import BACK

NAME = "removal control"
UNMEASURED = "the floor is guessing, and it is made of a model that never knew; give --reference"


@dataclass(frozen=True)
class Removal:
    """The control with its taught update, and without it before any attack."""

    chance: float
    """Share of its questions that guessing gets right."""
    taught: RecoveryCurve
    """The control on group V, with the update that was taught group V."""
    left: RecoveryCurve
    """The same without that update."""
    others: tuple[RecoveryCurve, RecoveryCurve] | None = None
    """The model that it was made from, and the control without the update, on everything else; None where nothing else
    can be asked."""

    @property
    def problem(self) -> str | None:
        """Why the control is none; None where it was taught and still works without what was taken out."""
        taught, n = float(self.taught.accuracy[0]), self.taught.hits.shape[2]
        if not is_enough(self.taught, self.chance):
            return (
                f"once taught it answers {taught:.3f} of group V right, less than {KNOWN:.1f} above"
                f" guessing ({self.chance:.3f}; n = {n}), so there is too little to take out"
            )
        if self.others and is_broken(*self.others):
            shares = [f"{float(one.accuracy[0]):.3f}" for one in self.others]
            return (
                f"it answers {shares[1]} of everything else right, surely less than {WORKING:.0%} of the {shares[0]} of"
                f" the model that it was made from (n = {self.others[0].hits.shape[2]})"
            )
        return None

    def describe(self) -> dict[str, Any]:
        """As ``audit.json`` holds it."""
        others = {"everything_else": float(self.others[1].accuracy[0])} if self.others else {}
        taught, left = float(self.taught.accuracy[0]), float(self.left.accuracy[0])
        return {"taught": taught, "before": left, **others, "n": self.left.hits.shape[2]}


def is_enough(taught: RecoveryCurve, chance: float) -> bool:
    """Whether a model was taught so much that there is something to take out, by the rule for what a base must know."""
    return float(taught.accuracy[0]) >= chance + KNOWN


def removal_recovery(compared: Sequence[Compared], removal: Removal, *, floor: str) -> dict[str, Any]:
    """What attacks seem to bring back of knowledge that is gone, as ``audit.json`` holds it.

    Attacks that see group V teach it, and show nothing here.

    Args:
        floor: What the floor is, in words.
    """
    described = removal.describe()
    if problem := removal.problem:
        return {**described, "limit": f"it could not be made: {problem}"}
    attacked = attacks_on_control(compared, {one.name: one.removed for one in compared}, BACK)
    if attacked is None:
        return {**described, "limit": UNATTACKED}
    best, of_floor = attacked.best, float(attacked.best.floor.accuracy.max())
    return {
        **described,
        **attacked.describe(),
        "floor": of_floor,
        "leak": best.leak().estimate().describe(),
        "told": (
            f"{_verdict(attacked.found)} The {NAME} answers {described['taught']:.3f} of group V right while it has the update"
            f" that was taught them, and {described['before']:.3f} once that update is taken out. {best.name} then brings it"
            f" to {attacked.reached:.3f}, {floor} to {of_floor:.3f} (share regained {show(attacked.share)}, n ="
            f" {described['n']})."
        ),
    }


def _verdict(found: bool) -> str:
    if found:
        return (
            "The audit seems to find knowledge that was surely taken out, so do not trust what else it finds in an edited"
            " model."
        )
    return "The audit finds no knowledge where it was surely taken out."
