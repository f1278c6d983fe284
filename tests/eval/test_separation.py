"""Separation and steadiness are their definitions, and intervals hold the truth."""

import random

import pytest
from excise.eval.separation import auc, auc_interval, harmonic_mean, same_gain, steadiness


def test_auc_counts_pairs_and_turns_round_with_the_pools():
    rng = random.Random(0)
    knowing, unknowing = ([rng.choice(range(6)) / 5 for _ in range(n)] for n in (7, 9))
    naive = 0.0
    for one in knowing:
        for other in unknowing:
            naive += 1.0 if one > other else 0.5 if one == other else 0.0
    assert auc(knowing, unknowing) == pytest.approx(naive / 63)
    assert auc(unknowing, knowing) == pytest.approx(1 - naive / 63)
    assert auc([1.0, 2.0], [0.0]) == 1.0 and auc([0.0], [0.0]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        auc([], [1.0])


@pytest.mark.parametrize(("apart", "sizes"), [(0.0, (8, 8)), (1.0, (10, 10)), (1.5, (5, 15)), (2.5, (20, 20))])
def test_the_interval_holds_the_true_auc(apart, sizes):
    """Normal values whose means are ``apart``: the true AUC is Phi(apart / sqrt 2)."""
    from statistics import NormalDist

    true, rng = NormalDist().cdf(apart / 2**0.5), random.Random(1)
    held = 0
    for _ in range(1000):
        knowing = [rng.gauss(apart, 1) for _ in range(sizes[0])]
        unknowing = [rng.gauss(0, 1) for _ in range(sizes[1])]
        low, high = auc_interval(auc(knowing, unknowing), *sizes)
        held += low <= true <= high
    assert held > 920


def test_five_models_that_are_told_apart_prove_little():
    low, high = auc_interval(1.0, 5, 5)
    assert 0.5 < low < 0.7 and high == 1.0
    assert auc_interval(1.0, 30, 30)[0] > 0.9


def test_what_moves_is_less_steady_and_signs_that_change_are_not_steady_at_all():
    assert steadiness(0.5, 0.5) == 1.0 and steadiness(0.0, 0.0) == 1.0
    assert steadiness(0.2, 0.4) == steadiness(0.4, 0.2) == pytest.approx(2 / 3)
    assert steadiness(0.0, 0.3) == 0.0 and same_gain(0.3, -0.1) == 0.0
    assert same_gain(0.3, 0.3) == 1.0 > same_gain(0.6, 0.3) > same_gain(0.9, 0.3)
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3) and harmonic_mean([1.0, 0.0]) == 0.0
