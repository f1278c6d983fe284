"""Worst cases: how far attacks get, with and without a working model."""

import itertools

import numpy as np
import pytest
from excise.eval.audit.bounded import KEPT, furthest_look, worst_cases
from excise.eval.audit.compared import Compared, envelope
from excise.eval.audit.findings import findings
from excise.eval.audit.recovery import RecoveryCurve


def _curve(right, working=None, n=50, m=10):
    """A curve of these shares right, of group V and of everything else."""
    hits = np.asarray([[[float(q < share * n) for q in range(n)] for share in right]])
    asked = None if working is None else np.asarray([[[float(q < s * m) for q in range(m)] for s in working]])
    return RecoveryCurve(tuple(range(len(right))), tuple(range(len(right))), hits, utility=asked)


def _naive(attacks, before):
    """By a loop over all looks of all attacks."""
    best, bounded = {}, []
    for name, curves in attacks.items():
        for curve in curves.values():
            for step in range(len(curve.steps)):
                value = sum(curve.hits[:, step].ravel()) / curve.hits[:, step].size
                best[name] = max(best.get(name, 0.0), value)
                asked = curve.utility
                if asked is None or sum(asked[:, step].ravel()) / asked[:, step].size >= KEPT * before:
                    bounded.append(value)
    return max(best.values()), np.mean(sorted(best.values())[-3:]), max(bounded, default=None)


def test_worst_cases_are_those_of_a_loop_over_all_looks():
    rng = np.random.default_rng(0)
    for _, before in itertools.product(range(20), (0.9, 1.0)):
        attacks = {
            name: {rate: _curve(rng.random(4), rng.random(4) if name != "few_shot" else None) for rate in (1e-3, 1e-2)}
            for name in ("few_shot", "rtt", "related", "relearn")
        }
        found = worst_cases(attacks, before)
        worst, mean, bounded = _naive(attacks, before)
        assert found.worst.value == pytest.approx(worst) and found.mean_of_worst == pytest.approx(mean)
        assert found.working.value == pytest.approx(bounded)


def test_an_attack_that_breaks_the_model_is_the_worst_case_and_not_that_of_a_working_model():
    breaking, mild = _curve([0.1, 0.9], [1.0, 0.3]), _curve([0.1, 0.4], [1.0, 0.9])
    found = worst_cases({"breaking": {1.0: breaking}, "mild": {1.0: mild}}, 1.0)
    assert found.worst.attack == "breaking" and found.worst.utility == 0.3
    assert (found.working.attack, found.working.value) == ("mild", 0.4)
    # The same attack at a milder rate counts again.
    gentle = _curve([0.1, 0.8], [1.0, 0.9])
    assert worst_cases({"breaking": {1.0: breaking, 0.1: gentle}}, 1.0).working.setting == 0.1
    assert furthest_look("breaking", {1.0: _curve([0.9], [0.1])}, 0.8) is None
    assert worst_cases({"breaking": {1.0: _curve([0.9], [0.1])}}, 1.0).working is None


def test_an_edited_model_is_held_against_its_own_utility():
    halved = _curve([0.1, 0.9], [0.5, 0.4])
    assert worst_cases({"rtt": {1.0: halved}}, 0.5).working.value == 0.9
    assert worst_cases({"rtt": {1.0: halved}}, 1.0).working is None


@pytest.mark.parametrize(("before", "after", "teaches"), [(0.1, 0.16, False), (0.1, 0.3, True)])
def test_an_attack_teaches_where_who_never_knew_gains_by_it(before, after, teaches):
    floor = _curve([before, after])
    attack = Compared("rtt", 2, False, _curve([1, 1]), _curve([0.1, 0.5]), floor, None, {}, floor_before=before)
    assert attack.floor_gain == pytest.approx(after - before) and attack.teaches is teaches
    cases = worst_cases({"rtt": {1.0: attack.edited}}, None)
    said = " ".join(findings([attack], cases, "a model that never knew,"))
    assert ("Attacks that teach: rtt (+0.200)" in said) is teaches and "0.500 under rtt" in said
    # Where no floor was measured, nothing is known of what an attack tells.
    unmeasured = Compared("rtt", 2, False, _curve([1, 1]), _curve([0.1, 0.5]), floor, None, {})
    assert unmeasured.floor_gain is None and not unmeasured.teaches


def test_the_envelope_of_a_search_is_the_best_trial_at_each_step():
    short, long = _curve([0.1, 0.5, 0.6], [1.0, 0.9, 0.1]), _curve([0.1, 0.2, 0.7, 0.4], [1.0, 0.8, 0.7, 0.6])
    number, best = envelope({0.0: short, 1.0: long})
    assert number == 1.0 and best.steps == (0, 1, 2, 3)
    assert list(best.accuracy) == pytest.approx([0.1, 0.5, 0.7, 0.4])
    assert list(best.utility.mean((0, 2))) == pytest.approx([1.0, 0.9, 0.7, 0.6])
    # Of one trial it is that trial.
    alone = envelope({0.0: short})[1]
    assert np.array_equal(alone.hits, short.hits) and alone.tokens == short.tokens
    without = envelope({0.0: _curve([0.1, 0.5]), 1.0: long})[1]
    assert without.utility is None and len(without.steps) == 4
    assert list(without.tokens) == sorted(without.tokens)


def test_utility_is_that_of_the_step_that_gets_furthest_neighbours_apart():
    edited = _curve([0.1, 0.9], [1.0, 0.5])
    attack = Compared("rtt", 2, False, _curve([1, 1], [1, 1]), edited, _curve([0.1, 0.1]), None, {}, near=(0, 1, 9))
    utility = attack.utility(0.8)
    assert utility["edited"] == 0.5 and utility["kept"] == pytest.approx(0.625) and utility["base"] == 1
    assert utility["neighbour"] == pytest.approx(2 / 3) and utility["rest"] == pytest.approx(3 / 7)
    assert attack.utility(None) is None
