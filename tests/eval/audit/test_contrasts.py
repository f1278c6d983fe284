"""Tests on accuracies under attack: held against closed forms, and against simulation where the truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from excise.eval.audit.compared import Compared
from excise.eval.audit.contrasts import Contrast, Paired, questions_to_tell, share_regained
from excise.eval.audit.recovery import RecoveryCurve, question_draws
from excise.eval.intervals import holm, wilson


def _one(hits):
    return RecoveryCurve((0,), (0,), np.asarray(hits, dtype=float)[None, None])


def _bonett_price(first, second):
    """Standard error of a difference of paired rates (Bonett and Price 2012, equation 2), from counts."""
    n = len(first)
    gained = sum(a > b for a, b in zip(first, second, strict=True))
    lost = sum(a < b for a, b in zip(first, second, strict=True))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    return math.sqrt((p + q - (p - q) ** 2) / (n + 2))


@pytest.mark.parametrize("rates", [(0.1, 0.1), (0.5, 0.2), (0.0, 0.0), (1.0, 1.0)])
def test_errors_of_rates_are_the_published_ones_where_the_bootstrap_is_narrower(rates):
    rng = np.random.default_rng(1)
    first, second = ((rng.random(60) < rate).astype(float) for rate in rates)
    contrast = Paired([_one(first), _one(second)]).contrast(1, -1)
    expected = _bonett_price(first, second)
    bootstrap = float((first - second).std() / math.sqrt(60))
    assert contrast.value == pytest.approx(first.mean() - second.mean())
    assert expected <= contrast.error + 1e-12 and contrast.error == pytest.approx(max(expected, bootstrap), rel=0.1)


def test_seeds_that_disagree_widen_what_one_seed_would_leave_narrow():
    apart = np.stack([np.ones((1, 50)), np.zeros((1, 50))])
    together = np.full((2, 1, 50), 0.5)
    floor = RecoveryCurve((0,), (0,), np.zeros((2, 1, 50)))
    wide, narrow = (Paired([RecoveryCurve((0,), (0,), hits), floor]).contrast(1, -1) for hits in (apart, together))
    assert wide.value == narrow.value == 0.5 and wide.error > 3 * narrow.error


def test_intervals_hold_the_true_difference_and_the_true_share():
    rng, hits, shares = np.random.default_rng(0), 0, 0
    audits, floor, edited, base = 300, 0.1, 0.3, 0.9
    for _ in range(audits):
        curves = [_one(rng.random(60) < rate) for rate in (edited, floor, base)]
        compared = Compared("one", 0, False, curves[2], curves[0], curves[1], None, {})
        low, high = compared.leak().estimate().ci95
        hits += low <= edited - floor <= high
        regained = compared.regained()
        low, high = (regained.ci95[0] or -math.inf), (regained.ci95[1] or math.inf)
        shares += low <= (edited - floor) / (base - floor) <= high
    assert hits / audits >= 0.93 and shares / audits >= 0.93


def test_a_floor_on_fewer_questions_of_its_own_varies_as_fewer_do():
    """Repeated until it has as many as the others, it would seem to vary half as much."""
    rng, contrasts, repeated, values = np.random.default_rng(3), [], [], []
    for _ in range(200):
        edited, base = (rng.random(160) < rate for rate in (0.4, 0.9))
        floor = rng.random(20) < 0.3
        curves = [_one(edited), _one(floor), _one(base)]
        contrasts.append(Paired(curves).contrast(1, -1, 0))
        repeated.append(Paired([curves[0], _one(np.resize(floor, 160)), curves[2]]).contrast(1, -1, 0).error)
        values.append(edited.mean() - floor.mean())
    true = float(np.std(values))
    assert [one.value for one in contrasts] == pytest.approx(values)
    assert 0.95 * true < np.mean([one.error for one in contrasts]) < 1.3 * true
    assert np.mean(repeated) < 0.6 * true
    held = [abs(one.value - 0.1) < 1.96 * one.error for one in contrasts]
    assert np.mean(held) > 0.93
    # Where it counts for nothing, it adds nothing.
    alone = Paired([curves[0], curves[2]]).contrast(1, -1)
    assert Paired(curves).contrast(1, 0, -1).error == pytest.approx(alone.error, rel=0.1)


def test_a_floor_on_as_many_questions_about_others_is_not_paired_with_them():
    """Both answer their first questions right, which says something only where these are the same questions."""
    edited, floor = (np.arange(160) < count for count in (64, 48))
    subjects = tuple(map(str, range(160)))
    mine, same = (replace(_one(hits), clusters=subjects) for hits in (edited, floor))
    own = replace(same, clusters=tuple(f"novel {one}" for one in subjects))
    paired, apart = (Paired([mine, other]).contrast(1, -1).error for other in (same, own))
    independent = math.sqrt(sum(p * (1 - p) / 160 for p in (0.4, 0.3)))
    assert apart == pytest.approx(independent, rel=0.1) and paired < 0.6 * independent


def test_alike_is_said_of_equal_models_with_enough_questions_and_never_of_few_or_different_ones():
    def alike(difference, n):
        rng = np.random.default_rng(n)
        found = 0
        for _ in range(100):
            curves = [_one(rng.random(n) < rate) for rate in (0.1 + difference, 0.1, 1.0)]
            found += Paired(curves).contrast(1, -1, 0).lies_within(0.1)
        return found

    assert alike(0.0, 20) == 0 and alike(0.0, 400) > 90
    # At the limit itself it is said in 5% at most.
    assert alike(0.1, 400) <= 10 and alike(0.2, 400) == 0


def test_holm_refuses_step_by_step():
    assert holm({"a": 0.001, "b": 0.02, "c": 0.024, "d": 0.9}) == ["a"]
    assert holm({"d": 0.9, "c": 0.02, "b": 0.012, "a": 0.001}) == ["c", "b", "a"]
    assert holm({"a": 0.03, "b": 0.9}) == [] and holm({"a": 0.03}) == ["a"] and holm({}) == []


def test_a_share_needs_a_gap_between_floor_and_base():
    curves = [_one([1] * 5 + [0] * 15), _one([1] * 9 + [0] * 11), _one([1] * 10 + [0] * 10)]
    assert share_regained(Paired(curves), 0.4).ci95 == (None, None)
    clear = [_one([1] * 5 + [0] * 15), _one([0] * 20), _one([1] * 20)]
    low, high = share_regained(Paired(clear), 0.25).ci95
    assert low < 0.25 < high


def test_the_number_of_questions_falls_with_the_distance_from_the_limit_or_from_zero():
    def needed(value):
        return questions_to_tell({"a": Contrast(value, 0.1)}, 40, 0.1)

    assert needed(0.0) < needed(0.05) and needed(0.15) < needed(0.11)
    assert needed(0.0) == 110  # 40 (1.645 x 0.1 / 0.1)^2 = 108.2


def test_contrasts_and_times_of_clustered_questions_are_wider_and_hold_the_true_difference():
    """Four questions a subject, all of them right or all wrong."""
    rng, held = np.random.default_rng(2), {"by subject": 0, "by question": 0}
    subjects = tuple(str(place // 4) for place in range(80))
    for _ in range(200):
        edited, floor = (np.repeat(rng.random(20) < rate, 4) for rate in (0.4, 0.1))
        for way, clusters in (("by subject", subjects), ("by question", ())):
            curves = [replace(_one(hits), clusters=clusters) for hits in (edited, floor)]
            low, high = Paired(curves).contrast(1, -1).estimate().ci95
            held[way] += low <= 0.3 <= high
    assert held["by subject"] >= 0.93 * 200 and held["by question"] < 0.8 * 200


def test_a_share_right_without_an_attack_has_the_interval_of_as_many_subjects_as_there_are():
    hits = np.repeat([1.0] * 5 + [0.0] * 15, 4)
    alone, clustered = _one(hits), replace(_one(hits), clusters=tuple(str(place // 4) for place in range(80)))
    assert alone.interval(0) == wilson(20, 80) and clustered.interval(0)[1] > wilson(5, 20)[1]


def test_draws_take_subjects_whole():
    curve = replace(_one([1.0, 1.0, 0.0, 0.0]), clusters=("a", "a", "b", "b"))
    weights = question_draws(curve, np.random.default_rng(0))
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[:, 0], weights[:, 1])
    alone = question_draws(_one([1.0, 1.0, 0.0, 0.0]), np.random.default_rng(0))
    assert not np.allclose(alone[:, 0], alone[:, 1])
