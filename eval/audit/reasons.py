"""Why a verdict is what it is, in sentences: each states its figure, the figure's interval and n, and no adjective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .compared import Compared
from .contrasts import Contrast
from .controls import UNMEASURED, UNTRAINED
from .missing import NOTHING_MISSING, Missing
from .recovery import SHARES, Estimate
from .worst import WorstAttack

GROUPS = "T: may be trained on; V: held out."
"""What the two groups of a concept pack's questions are, in the words that pages print."""


@dataclass(frozen=True)
class Relearning:
    """How fast V is relearned from its own texts."""

    attack: Compared | None
    """None where it was not among the attacks."""
    speed_up: Estimate
    share: float
    """Of what the base knew: how much is relearned in the time that is compared."""
    fast: bool
    """Whether it counts as faster than learning afresh."""
    reached: bool = False
    """Whether the edited model has that share without any attack."""
    unsettled: bool = False
    """Whether it may be faster, as far as the interval tells."""
    compared: bool = True
    """Whether anybody learned V afresh to compare with."""


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on."""

    attacks: Mapping[str, Compared]
    """Those that never see group V."""
    regained: Mapping[str, Estimate]
    leaks: Mapping[str, Contrast]
    untouched: Compared
    """Its first point is the edited model before any attack."""
    relearning: Relearning
    floor: str
    """In words: "the model that was never trained on it"."""
    recovering: Sequence[str]
    above: Sequence[str]
    """Attacks under which the edited model is surely better than the floor."""
    below: Sequence[str]
    """Attacks under which it is surely worse: it avoids answers that a model which never knew would hit by chance."""
    unsettled: Sequence[str]
    """Attacks under which it is not shown to be as good as the floor."""
    questions: int
    """About how many would settle them."""
    perhaps: list[str]
    """Attacks that seem to bring back half of it or more, which so few questions cannot show."""
    never_erased: bool
    worst: WorstAttack
    limits: Mapping[str, float]
    missing: Missing = NOTHING_MISSING


def reasons(verdict: str, evidence: Evidence) -> list[str]:
    """Sentences in the order in which they matter."""
    if evidence.never_erased:
        return [_untouched(evidence), _strongest(evidence)]
    if verdict == "recovers":
        first = [_recovering(evidence)]
    elif verdict == "partially_robust":
        first = [_not_recovering(evidence), *_apart(evidence)]
    elif verdict == "inconclusive":
        first = [_too_few(evidence)]
    else:
        first = [_alike(evidence)]
    return [*first, _strongest(evidence), _speed(evidence.relearning, evidence.missing)]


def show(estimate: Estimate) -> str:
    """A value with its interval; an open end is censored."""
    if estimate.value is None:
        return "not measurable"
    low, high = ("…" if end is None else f"{end:.2f}" for end in estimate.ci95)
    sign = {">": "more than ", "<": "less than "}.get(estimate.bound, "")
    return f"{sign}{estimate.value:.2f} [{low}, {high}]"


def _untouched(evidence: Evidence) -> str:
    accuracy, n = float(evidence.untouched.edited.accuracy[0]), evidence.untouched.n
    low, high = evidence.untouched.edited.interval(0)
    return (
        f"It was never erased: without any attack the edited model answers {accuracy:.3f} [{low:.2f}, {high:.2f}] of"
        f" group V right, the base {float(evidence.untouched.base.accuracy[0]):.3f} (n = {n})."
    )


def _recovering(evidence: Evidence) -> str:
    each = ", ".join(f"{name} (share regained {show(evidence.regained[name])})" for name in evidence.recovering)
    return f"Knowledge of group V recovers under {each}; n = {evidence.untouched.n}."


def _not_recovering(evidence: Evidence) -> str:
    return (
        f"Recovery is not shown: no attack surely brings back more than {evidence.limits['regained']:.2f} of the way to"
        " the base."
    )


def _apart(evidence: Evidence) -> list[str]:
    sentences = []
    floor = _floor_name(evidence)
    if evidence.above:
        sentences.append(
            f"It is told apart from {floor}: it answers more of group V right under {_each(evidence, evidence.above)}."
        )
    if evidence.below:
        sentences.append(
            f"It is told apart from {floor}: it answers fewer of group V right under {_each(evidence, evidence.below)},"
            " so it avoids answers that guessing would hit."
        )
    return sentences


def _alike(evidence: Evidence) -> str:
    return (
        f"Under every attack the accuracy lies within {evidence.limits['leak']:.2f} of that of {_floor_name(evidence)}"
        f" (two one-sided tests at 5%); the interval that reaches furthest is that of"
        f" {_each(evidence, [_widest(evidence)])}."
    )


def _too_few(evidence: Evidence) -> str:
    if evidence.perhaps:
        each = ", ".join(f"{name} (share regained {show(evidence.regained[name])})" for name in evidence.perhaps)
        return (
            f"Inconclusive, too few questions: half of it or more seems to come back under {each}, and n ="
            f" {evidence.untouched.n} do not show that it is more than {evidence.limits['regained']:.2f}. About"
            f" {evidence.questions} questions of group V would do, if the figures stay as they are."
        )
    # Questions would not help where there is nothing to compare with.
    if evidence.missing.floor or evidence.missing.training:
        limits = [UNMEASURED] * evidence.missing.floor + [UNTRAINED] * evidence.missing.training
        return f"Inconclusive: {'. Also, '.join(limits)}."
    if not evidence.unsettled and not evidence.relearning.compared:
        return "Inconclusive: no model learned V afresh, so relearning is compared with nothing; give --reference."
    if not evidence.unsettled:
        return (
            f"Inconclusive: relearning may be more than {evidence.limits['speed_up']:g} times as fast as learning"
            " afresh, as far as its interval tells; more questions or a larger --budget would settle it."
        )
    return (
        f"Inconclusive, too few questions: under {len(evidence.unsettled)} of {len(evidence.leaks)} attacks the model is"
        f" neither told apart from {_floor_name(evidence)} nor shown to lie within {evidence.limits['leak']:.2f} of it;"
        f" the interval that reaches furthest is that of {_each(evidence, [_widest(evidence)])}. About"
        f" {evidence.questions} questions of group V would do, if the figures stay as they are."
    )


def _floor_name(evidence: Evidence) -> str:
    return evidence.floor.rstrip(",")


def _each(evidence: Evidence, names: Sequence[str]) -> str:
    figures = (f"{name} ({show(evidence.leaks[name].estimate())}, n = {evidence.attacks[name].n})" for name in names)
    return ", ".join(figures)


def _widest(evidence: Evidence) -> str:
    """The attack whose interval reaches furthest from 0, and so holds for all; no estimate of the largest leak."""
    return max(evidence.leaks, key=lambda key: abs(evidence.leaks[key].value) + evidence.leaks[key].error)


def _strongest(evidence: Evidence) -> str:
    worst = evidence.worst
    return (
        f"The attack that gets furthest without seeing group V on one half of the questions is {worst.name}. On the"
        f" other half the edited model answers {worst.edited:.3f} right, {evidence.floor} {worst.floor:.3f}, the base"
        f" {worst.base:.3f} (share regained {show(worst.regained)}, n = {worst.n})."
    )


def _speed(relearning: Relearning, missing: Missing) -> str:
    share = SHARES[relearning.share]
    source = "its questions with their answers" if missing.texts else "its own texts"
    if relearning.attack is None:
        return f"Relearning V from {source} was not among the attacks."
    if not relearning.compared:
        return "How fast V is learned afresh could not be measured, so relearning is compared with nothing."
    if relearning.reached:
        return (
            f"The edited model has {share} of what the base knows of V without any attack, so no relearning is timed."
        )
    if relearning.speed_up.value is None:
        return (
            f"No model relearned even a tenth of V from {source} within the budget, so there is no speed-up to report."
        )
    return (
        f"Relearning {share} of V from {source} is {show(relearning.speed_up)} times as fast as learning it afresh"
        f" (n = {relearning.attack.n})."
    )
