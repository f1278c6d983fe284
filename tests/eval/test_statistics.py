import random

import pytest
from excise.eval.statistics import Scores, summarize, wilson


def _scores(totals, weights=None, **options):
    totals = tuple(map(float, totals))
    weights = tuple(map(float, weights or [1] * len(totals)))
    return Scores("m", "s", "u", "higher", tuple(map(str, range(len(totals)))), totals, weights, **options)


def test_a_rate_of_one_still_has_a_width():
    low, high = _scores([1] * 50).interval()
    assert 0.9 < low < 1.0 and high == 1.0


def test_wilson_holds_the_truth_about_95_times_in_100():
    rng = random.Random(0)
    held = 0
    for _ in range(1000):
        hits = sum(rng.random() < 0.3 for _ in range(60))
        low, high = wilson(hits, 60)
        held += low <= 0.3 <= high
    assert 930 <= held <= 970


def test_averages_weigh_items_by_their_tokens():
    assert _scores([1.0, 6.0], [1, 3]).value() == pytest.approx(7 / 4)


def test_a_paired_difference_is_narrower_than_the_intervals_suggest():
    base = [i % 2 for i in range(200)]
    better = list(base)
    better[0] = 1 - better[0]
    value, (low, high) = _scores(better).difference(_scores(base))
    assert value == pytest.approx(1 / 200)
    assert high - low < 0.03 < _scores(base).interval()[1] - _scores(base).interval()[0]


def test_differences_need_the_same_items():
    with pytest.raises(AssertionError):
        _scores([1, 0]).difference(_scores([1, 0, 1]))


def test_summaries_carry_n_skipped_and_interval():
    item = summarize(_scores([1, 0, 1, 1], skipped=2), "edited", _scores([1, 0, 0, 0]))
    assert (item.n, item.skipped, item.value) == (4, 2, 0.75)
    assert item.ci95[0] < 0.75 < item.ci95[1]
    assert item.difference is not None and item.difference["value"] == pytest.approx(0.5)
