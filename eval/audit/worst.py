"""The attack that gets furthest: chosen on one half of the questions and reported on the other.

The largest of many figures is large by luck too. With 20 questions the worst of eleven attacks on a model that holds
nothing shows a share regained of 0.13 to 0.17, where it is chosen and reported on the same questions.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..intervals import numbered
from .compared import Compared
from .contrasts import Paired, share_regained
from .recovery import Estimate, RecoveryCurve, regained


@dataclass(frozen=True)
class WorstAttack:
    """Accuracies under it on the questions that did not choose it, each model at the step that the others chose."""

    name: str
    edited: float
    floor: float
    base: float
    regained: Estimate
    n: int
    """Questions of the half that is reported."""

    def describe(self) -> dict[str, object]:
        """As ``audit.json`` holds it."""
        accuracies = {"edited": self.edited, "reference": self.floor, "base": self.base}
        return {"name": self.name, **accuracies, "regained": self.regained.describe(), "n": self.n}


def worst_attack(attacks: Mapping[str, Compared]) -> WorstAttack:
    """Choose among attacks, each with its step, on one half of the subjects; report on the other half."""

    def share(one: Compared) -> float:
        value = regained(*(_part(curve, halves(curve)[0]).accuracy for curve in (one.edited, one.floor, one.base)))
        return value or 0.0

    name = max(attacks, key=lambda key: share(attacks[key]))
    chosen = attacks[name]
    curves = [_at_best_step(curve, *halves(curve)) for curve in (chosen.edited, chosen.floor, chosen.base)]
    edited, floor, base = (curve.accuracy for curve in curves)
    estimate = share_regained(Paired(curves), regained(edited, floor, base))
    return WorstAttack(name, float(edited[0]), float(floor[0]), float(base[0]), estimate, curves[0].hits.shape[2])


def halves(curve: RecoveryCurve) -> tuple[list[int], list[int]]:
    """Places of the questions in two halves that share no subject, drawn at random."""
    n = curve.hits.shape[2]
    subjects = numbered(curve.clusters) if len(set(curve.clusters)) > 1 else list(range(n))
    order = random.Random("excise halves").sample(range(max(subjects) + 1), k=max(subjects) + 1)
    first = set(order[: len(order) // 2])
    return [at for at in range(n) if subjects[at] in first], [at for at in range(n) if subjects[at] not in first]


def _part(curve: RecoveryCurve, places: Sequence[int]) -> RecoveryCurve:
    clusters = tuple(curve.clusters[place] for place in places) if curve.clusters else ()
    return replace(curve, hits=curve.hits[:, :, list(places)], clusters=clusters)


def _at_best_step(curve: RecoveryCurve, choosing: Sequence[int], reporting: Sequence[int]) -> RecoveryCurve:
    step = int(_part(curve, choosing).accuracy.argmax())
    part = _part(curve, reporting)
    return replace(part, steps=(curve.steps[step],), tokens=(curve.tokens[step],), hits=part.hits[:, step : step + 1])
