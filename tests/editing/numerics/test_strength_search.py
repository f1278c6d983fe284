import math

import pytest
from excise.editing.numerics.strength_search import MOST_TRIES, strength_within

CURVES = {
    "square": lambda s: 0.4 * s**2,
    "steeper, as far out": lambda s: 0.4 * s**2 + 3 * s**6,
    "slow": lambda s: 0.4 * s**0.7,
    "saturating": lambda s: 5 * (1 - math.exp(-3 * s**2)),
    "broken when strong": lambda s: 0.4 * s**2 if s < 0.6 else math.nan,
}


@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.05, 0.11])
@pytest.mark.parametrize("name", CURVES)
def test_the_divergence_found_lies_between_95_percent_of_the_budget_and_the_budget(name, budget):
    found = strength_within(budget, CURVES[name])
    assert found.outcome == "within" and 0.95 * budget <= CURVES[name](found.strength) <= budget
    assert found.divergence == CURVES[name](found.strength) and 0 < found.strength <= 1
    assert len(found.tries) <= 12 and found.is_monotone


def test_near_the_base_two_or_three_looks_are_enough():
    assert len(strength_within(0.01, CURVES["square"]).tries) == 2
    # Halving alone would take more.
    assert len(strength_within(1e-3, CURVES["steeper, as far out"]).tries) <= 5


def test_an_edit_below_the_budget_stays_whole_unless_more_is_allowed():
    found = strength_within(1.0, CURVES["square"])
    assert (found.outcome, found.strength, len(found.tries)) == ("whole", 1.0, 1)
    more = strength_within(1.0, CURVES["square"], most=8.0)
    assert more.outcome == "within" and 1.5 < more.strength < 1.6
    assert strength_within(100.0, CURVES["square"], most=4.0).strength == 4
    # Nothing stronger than what is allowed is ever tried.
    assert strength_within(1.0, CURVES["square"], most=0.5).tries[0].strength == 0.5


def test_a_jump_over_the_range_is_said_and_the_last_strength_below_it_taken():
    found = strength_within(0.01, lambda s: 0.001 if s < 0.3 else 0.2)
    assert found.outcome == "steps" and found.divergence == 0.001 and 0.299 < found.strength < 0.3
    assert len(found.tries) <= MOST_TRIES


def test_a_budget_below_the_first_step_finds_nothing():
    found = strength_within(1e-9, lambda s: 0.0 if s < 0.01 else 1e-6 + s**2)
    assert found.outcome == "nothing" and found.divergence == 0 and 1e-4 < found.least < 1.3e-4


def test_a_curve_that_falls_somewhere_is_called_so():
    found = strength_within(0.01, lambda s: 0.02 * math.sin(9 * s) ** 2 + 0.0005 * s)
    assert not found.is_monotone or found.outcome in ("within", "whole")
    wavy = strength_within(0.012, lambda s: {1.0: 0.05}.get(s, 0.06 if s > 0.4 else 0.03 * s))
    assert not wavy.is_monotone and wavy.outcome == "within"
