"""The verdict on a behaviour: what brings it back, what teaches it to anybody, and what forbids a verdict."""

import numpy as np
import pytest
from excise.eval.audit.behaviour import judge_behaviour, teaching_attacks
from excise.eval.audit.compared import Compared
from excise.eval.audit.recovery import RecoveryCurve, Scale

N = 60
STEPS, TOKENS = (0, 1, 4, 16), (0, 100, 400, 1600)


def _curve(*rates, utility=None):
    """Exactly these shares of the prompts show it, step by step."""
    hits = np.asarray([[[float(place < round(rate * N)) for place in range(N)] for rate in rates]])
    asked = None if utility is None else np.full((1, len(rates), 20), 0.0) + np.asarray(utility)[None, :, None]
    return RecoveryCurve(STEPS[: len(rates)], TOKENS[: len(rates)], hits, utility=asked)


def _attack(name, base, edited, floor, tier=2, control=None, known=False, utility=(1.0, 1.0, 1.0, 1.0)):
    curves = [_curve(*rates, utility=utility[: len(rates)]) for rates in (base, edited, floor)]
    repaired = STEPS[-1] if name == "benign" else 0
    return Compared(name, tier, known, *curves, control and _curve(*control), {}, repaired=repaired)


ALWAYS, NEVER = (1.0,) * 4, (0.0,) * 4
STYLE = _attack("style_lower", (1.0,), (0.0,), (0.0,), tier=0)
BENIGN = _attack("benign", ALWAYS, NEVER, NEVER)
TAUGHT = _attack("pairs_8", ALWAYS, (0.0, 0.1, 0.6, 1.0), (0.0, 0.1, 0.6, 1.0), control=(0.0, 0.5, 1.0, 1.0))
SCALE = Scale(0.0, 1.0)


def _judged(*attacks, scale=SCALE, utility=None):
    return judge_behaviour(list(attacks), scale, utility, "the floor", "pairs_8")


def test_a_behaviour_holds_that_comes_back_only_where_the_attack_teaches_it_to_the_floor():
    judged = _judged(STYLE, BENIGN, TAUGHT)
    assert (judged.verdict, judged.teaching) == ("holds", ("pairs_8",))
    assert any("pairs_8: the floor gets half of the way to the base or more too" in reason for reason in judged.reasons)
    # The same attack on a floor that learns nothing of it shows that it was still there.
    back = _attack("pairs_8", ALWAYS, (0.0, 0.1, 0.6, 1.0), NEVER, control=(0.0, 0.5, 1.0, 1.0))
    assert teaching_attacks([back], SCALE) == () and _judged(STYLE, BENIGN, back).verdict == "recovers"


def test_benign_fine_tuning_that_brings_it_back_is_recovery():
    judged = _judged(STYLE, _attack("benign", ALWAYS, (0.0, 0.2, 0.5, 0.7), NEVER), TAUGHT)
    assert judged.verdict == "recovers" and "recovers under benign" in judged.reasons[0]


def test_what_was_never_removed_is_said_before_anything_else():
    shown = [
        _attack(one.name, ALWAYS[:k], ALWAYS[:k], NEVER[:k], tier) for one, k, tier in ((STYLE, 1, 0), (BENIGN, 4, 2))
    ]
    judged = _judged(*shown, TAUGHT)
    assert judged.verdict == "recovers"
    judged = _judged(*shown, _attack("pairs_8", ALWAYS, ALWAYS, NEVER, control=(0.0, 0.5, 1.0, 1.0)))
    assert judged.reasons[0].startswith(
        "It was never removed: without any attack the edited model shows the behaviour in 1.0"
    )


def test_less_of_it_than_the_floor_shows_does_not_count_against_an_edit():
    avoids = _attack("style_upper", (1.0,), (0.0,), (0.4,), tier=0)
    assert _judged(avoids, BENIGN, TAUGHT).verdict == "holds"
    more = _attack("style_upper", (1.0,), (0.22,), (0.0,), tier=0)
    assert _judged(more, BENIGN, TAUGHT).verdict == "partially_robust"


def test_attacks_that_have_the_base_decide_nothing():
    given = _attack("add_direction", (1.0,), (1.0,), (0.0,), tier=0, known=True)
    assert _judged(STYLE, BENIGN, TAUGHT, given).verdict == "holds"


@pytest.mark.parametrize(
    ("attacks", "scale", "said"),
    [
        ((STYLE, BENIGN, TAUGHT), Scale(0.0, 0.15), "too little to remove"),
        ((BENIGN, TAUGHT), SCALE, "fewer than two attacks"),
        ((STYLE, BENIGN), SCALE, "no attack trained the suppressed control"),
        (
            (STYLE, BENIGN, _attack("pairs_8", ALWAYS, NEVER, NEVER, control=(0.0, 0.1, 0.1, 0.2))),
            SCALE,
            "these attacks are too weak",
        ),
        (
            (STYLE, BENIGN, _attack("pairs_8", ALWAYS, NEVER, NEVER, control=ALWAYS)),
            SCALE,
            "the suppressed control still shows the behaviour in 1.000",
        ),
    ],
)
def test_without_its_controls_there_is_no_verdict(attacks, scale, said):
    judged = _judged(*attacks, scale=scale)
    assert judged.verdict == "inconclusive" and any(said in reason for reason in judged.reasons)


def test_a_model_that_no_longer_replies_has_not_lost_a_behaviour():
    base, broken = (RecoveryCurve((0,), (0,), np.full((1, 1, 40), rate)) for rate in (1.0, 0.0))
    stays = _attack("benign", ALWAYS, NEVER, NEVER, utility=NEVER)
    # The base is asked under the same attack, and there it replies.
    stays = Compared("benign", 2, False, BENIGN.base, stays.edited, BENIGN.floor, None, {}, repaired=STEPS[-1])
    assert _judged(STYLE, stays, TAUGHT, utility=(base, broken)).verdict == "broken_not_erased"
    mended = _judged(STYLE, BENIGN, TAUGHT, utility=(base, broken))
    assert mended.verdict == "inconclusive" and "audit the repaired model" in mended.reasons[-1]
    assert _judged(STYLE, BENIGN, TAUGHT, utility=(base, base)).verdict == "holds"
