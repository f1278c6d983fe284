"""The attack that gets furthest is chosen on questions that do not report it."""

import dataclasses

import numpy as np
from excise.eval.audit.compared import Compared
from excise.eval.audit.recovery import RecoveryCurve
from excise.eval.audit.worst import halves, worst_attack

SUBJECTS = tuple(str(place // 4) for place in range(80))


def _attack(rng, name, edited, floor=0.125, n=20, steps=1):
    curves = [
        RecoveryCurve(tuple(range(steps)), tuple(range(steps)), (rng.random((1, steps, n)) < rate).astype(float))
        for rate in (1.0, edited, floor)
    ]
    return Compared(name, 0, False, *curves, None, {})


def test_the_worst_of_eleven_attacks_on_a_model_that_holds_nothing_brings_nothing_back():
    """Chosen and reported on the same 20 questions it would show a tenth and more."""
    rng, same, other = np.random.default_rng(0), [], []
    for _ in range(150):
        attacks = {str(number): _attack(rng, str(number), 0.125, steps=4) for number in range(11)}
        same.append(max(one.regained().value or 0.0 for one in attacks.values()))
        other.append(worst_attack(attacks).regained.value or 0.0)
    assert np.mean(same) > 0.1 and abs(np.mean(other)) < 0.04


def test_an_attack_that_brings_most_back_is_chosen_and_shows_it():
    rng = np.random.default_rng(1)
    attacks = {name: _attack(rng, name, rate, n=200) for name, rate in (("a", 0.2), ("b", 0.8), ("c", 0.2))}
    worst = worst_attack(attacks)
    assert worst.name == "b" and worst.n == 100 and worst.base == 1
    assert abs(worst.edited - 0.8) < 0.15 and abs(worst.regained.value - 0.77) < 0.15
    assert worst.describe()["reference"] == worst.floor


def test_halves_share_no_subject_and_leave_none_out():
    alone = _attack(np.random.default_rng(2), "a", 0.2, n=80).edited
    first, second = halves(dataclasses.replace(alone, clusters=SUBJECTS))
    assert sorted(first + second) == list(range(80)) and len(first) == len(second) == 40
    assert not {SUBJECTS[place] for place in first} & {SUBJECTS[place] for place in second}
    # Without subjects they are drawn question by question.
    first, second = halves(alone)
    assert len(first) == 40 and {SUBJECTS[place] for place in first} & {SUBJECTS[place] for place in second}
