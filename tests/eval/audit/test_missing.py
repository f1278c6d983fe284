"""Where a pack leaves a comparison out, there are fewer verdicts, and none takes the place of what is missing."""

import numpy as np
import pytest
from excise.eval.audit.missing import NOTHING_MISSING, Missing
from excise.eval.audit.recovery import RecoveryCurve, Scale
from excise.eval.audit.verdict import Compared, judge

N = 400
SCALE = Scale(0.25, 0.85)
"""Half of the way from chance to the base is 0.55, a quarter of it 0.40."""
RATES = {"base": 1e-3, "edited": 1e-3, "reference": 0.0}


def _rates(*rates):
    """One seed; the same questions right at each step as the rate says."""
    hits = np.asarray([[[float(place < rate * N) for place in range(N)] for rate in rates]])
    return RecoveryCurve(tuple(range(len(rates))), tuple(100 * step for step in range(len(rates))), hits)


WITHHELD = _rates(0.3, 0.8)


def _guesser(like):
    return RecoveryCurve(like.steps, like.tokens, np.full(like.hits.shape, SCALE.chance))


def _judged(edited, missing, floor=None, control=WITHHELD, relearned=None):
    """Three attacks that train and one that does not, all reaching the same."""
    base = _rates(*(SCALE.known for _ in edited.steps))
    floor = floor or _guesser(edited)
    relearned = relearned or edited
    compared = [
        Compared("rtt", 2, False, base, edited, floor, control, RATES),
        Compared("unrelated", 2, False, base, edited, floor, None, RATES),
        Compared("relearn", 2, True, base, relearned, floor, control, RATES),
    ]
    return judge(compared, SCALE, None, "guessing", missing)


@pytest.mark.parametrize(
    ("edited", "verdict"),
    [
        ((0.25, 0.8), "recovers"),
        ((0.75, 0.8), "recovers"),
        # A model that never knew may guess so much: the floor's control would allow it too.
        ((0.25, 0.5), "inconclusive"),
        ((0.25, 0.56), "inconclusive"),
        ((0.25, 0.25), "inconclusive"),
        ((0.05, 0.1), "inconclusive"),
    ],
)
def test_above_guessing_alone_knowledge_is_back_only_beyond_half_and_nothing_else_is_decided(edited, verdict):
    judged = _judged(_rates(*edited), Missing(floor=True, afresh=True))
    assert judged.verdict == verdict, judged.reasons
    assert judged.speed_up.value is None
    if verdict == "inconclusive":
        assert "give --reference" in judged.reasons[0] or "too few questions" in judged.reasons[0]


def test_the_same_figures_above_a_floor_that_was_measured_decide():
    def measured(*edited):
        return _judged(_rates(*edited), NOTHING_MISSING, floor=_rates(0.25, 0.25)).verdict

    assert measured(0.25, 0.5) == "recovers" and measured(0.05, 0.1) == "partially_robust"
    assert measured(0.25, 0.25) == "indistinguishable_from_never_trained"


def test_what_can_be_guessed_decides_nothing_without_a_model_that_never_knew():
    for edited in ((0.8, 0.8), (0.25, 0.8), (0.25, 0.25)):
        judged = _judged(_rates(*edited), Missing(floor=True, guessing=True, afresh=True))
        assert judged.verdict == "inconclusive"
        assert "which passage continues a text, and no model that never knew says how often" in judged.reasons[0]
        assert judged.controls["floor"]["problem"]


def test_without_learning_afresh_no_model_is_like_one_that_never_learned():
    floor = _rates(0.25, 0.25)
    judged = _judged(_rates(0.25, 0.25), Missing(afresh=True), floor=floor)
    assert judged.verdict == "inconclusive" and "no model learned V afresh" in judged.reasons[0]
    assert judged.reasons[-1].startswith("How fast V is learned afresh could not be measured")
    # What does not rest on it is decided: here relearning is fast, and says nothing.
    fast = {"relearned": _rates(0.25, 0.8), "floor": floor}
    assert _judged(_rates(0.25, 0.25), Missing(afresh=True), **fast).verdict == "inconclusive"
    assert _judged(_rates(0.25, 0.8), Missing(afresh=True), floor=floor).verdict == "recovers"
    assert _judged(_rates(0.05, 0.1), Missing(afresh=True), floor=floor).verdict == "partially_robust"


def test_where_nothing_could_train_on_t_only_what_comes_back_is_decided():
    options = {"missing": Missing(training=True), "floor": _rates(0.25, 0.25), "control": None}
    assert _judged(_rates(0.25, 0.8), **options).verdict == "recovers"
    for edited in ((0.25, 0.25), (0.05, 0.1)):
        judged = _judged(_rates(*edited), **options)
        assert judged.verdict == "inconclusive" and "nothing of group T to train on" in judged.reasons[0]


def test_attacks_that_train_nothing_are_not_enough_to_say_so():
    one = Compared("int4", 0, False, _rates(0.85), _rates(0.8), _rates(0.25), None, RATES)
    judged = judge([one, one], SCALE, None, "guessing", Missing(training=True))
    assert judged.verdict == "inconclusive" and "nothing of group T to train on" in judged.reasons[0]
