"""What an audit must do without, because the pack has no data for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Missing:
    """Comparisons that could not be made; by default none is missing."""

    floor: bool = False
    """No model that never knew was measured, nor the base on what nobody knows: the floor is guessing. Then knowledge
    is back only where it surely passes half of the way to the base, and nothing else is decided."""
    guessing: bool = False
    """Questions can be answered beyond chance without knowing, and no model says how well: nothing is decided."""
    afresh: bool = False
    """How fast V is learned afresh was not measured, so relearning is not compared with it."""
    texts: bool = False
    """V has no texts of its own: relearning reads its questions with their answers."""
    training: bool = False
    """No attack could train on T, so nothing shows how strong attacks are: only what surely comes back is decided."""


NOTHING_MISSING = Missing()
