"""What an audit found beside its verdict, in sentences with their figures."""

from collections.abc import Sequence

from .bounded import KEPT, Reached, WorstCases
from .compared import TEACHES, Compared


def findings(compared: Sequence[Compared], cases: WorstCases, floor: str | None) -> list[str]:
    """How far attacks get with and without a working model, and which attacks teach.

    Args:
        floor: In words, what never knew; None where that was not measured.
    """
    said = _worst(cases)
    if floor and (teaching := [one for one in compared if one.teaches]):
        each = ", ".join(f"{one.name} ({one.floor_gain:+.3f})" for one in teaching)
        said.append(
            f"Attacks that teach: {each}. By so much {floor.rstrip(',')} gains on group V (more than {TEACHES:.1f}),"
            " so what the edited model gains under them may be what the attack told it."
        )
    return said


def _worst(cases: WorstCases) -> list[str]:
    if cases.worst is None or cases.mean_of_worst is None:
        return []
    first = (
        f"Right on group V in the worst case: {_shown(cases.worst)}; mean of the worst {len(cases.averaged)} attacks"
        f" {cases.mean_of_worst:.3f} ({', '.join(cases.averaged)})."
    )
    if cases.before is None:
        return [first]
    bound = f"at least {KEPT:.1f} of the edited model's utility of {cases.before:.3f}"
    if cases.working is None:
        return [first, f"No attack keeps {bound}."]
    return [first, f"While the model keeps {bound}: {_shown(cases.working)}."]


def _shown(reached: Reached) -> str:
    utility = "" if reached.utility is None else f", right on everything else {reached.utility:.3f}"
    return f"{reached.value:.3f} under {reached.attack}{utility}"
