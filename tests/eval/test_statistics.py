import math
import random

import pytest
from excise.artifacts.reporting.results import not_measured, summarize_all
from excise.editing.errors import ExciseError
from excise.eval.statistics import Scores, summarize, tango, wilson
from oracle.intervals import paired_rate_interval


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
    assert high - low < 0.05 < _scores(base).interval()[1] - _scores(base).interval()[0]


@pytest.mark.parametrize(
    ("gained", "lost", "n", "wanted"),
    [(0, 0, 20, (-0.161, 0.161)), (0, 200, 200, (-1.0, -0.962)), (0, 0, 1, (-0.793, 0.793))],
)
def test_a_difference_without_any_pair_that_differs_still_has_a_width(gained, lost, n, wanted):
    assert tango(gained, lost, n) == pytest.approx(wanted, abs=5e-4)


def test_limits_of_paired_differences_are_those_of_a_search():
    rng = random.Random(0)
    for _ in range(60):
        n = rng.choice([1, 2, 5, 20, 80, 800])
        gained = rng.randint(0, n)
        lost = rng.randint(0, n - gained)
        low, high = tango(gained, lost, n)
        assert (low, high) == pytest.approx(paired_rate_interval(gained, lost, n), abs=1e-9)
        assert -1 <= low <= (gained - lost) / n <= high <= 1
        assert tango(lost, gained, n) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize("n", [5, 20, 80])
def test_paired_intervals_hold_the_truth_where_a_bootstrap_does_not(n):
    """A true loss of 0.05: 0.06 of the items are lost, 0.01 gained."""
    rng = random.Random(n)
    held = {"tango": 0, "bootstrap": 0}
    for _ in range(400):
        draws = [rng.random() for _ in range(n)]
        base = _scores([float(draw < 0.9) for draw in draws])
        edited = _scores([float(draw < 0.84 or draw > 0.99) for draw in draws])
        low, high = edited.difference(base)[1]
        held["tango"] += low <= -0.05 <= high
        totals = sorted(
            sum(rng.choices([a - b for a, b in zip(edited.totals, base.totals, strict=True)], k=n)) / n
            for _ in range(200)
        )
        held["bootstrap"] += totals[5] <= -0.05 <= totals[194]
    assert held["tango"] >= 0.92 * 400
    assert held["bootstrap"] < (0.75 if n < 80 else 0.95) * 400


def test_a_value_that_is_no_number_is_an_error_at_once():
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(ExciseError, match=r"m on s: 1 of 2 items gave no finite number, the first 1"):
            _scores([0.0, broken])


def test_where_no_item_could_be_scored_there_is_no_value_and_it_is_said():
    nothing = Scores("reverse_perplexity", "concept", "u", "base", (), (), (), exponential=True, skipped=80)
    weightless = _scores([0.0, 0.0], [0, 0], skipped=3)
    some = _scores([1.0, 2.0])
    scores = {"base": [some], "edited": [nothing, weightless, some]}
    assert [item.subject for item in summarize_all(scores)] == ["base", "edited"]
    first, second = not_measured(scores)
    assert "edited model" in first and "(concept); none of its 80 items" in first and "3 items" in second


def test_differences_need_the_same_items():
    with pytest.raises(AssertionError):
        _scores([1, 0]).difference(_scores([1, 0, 1]))


def test_summaries_carry_n_skipped_and_interval():
    item = summarize(_scores([1, 0, 1, 1], skipped=2), "edited", _scores([1, 0, 0, 0]))
    assert (item.n, item.skipped, item.value) == (4, 2, 0.75)
    assert item.ci95[0] < 0.75 < item.ci95[1]
    assert item.difference is not None and item.difference["value"] == pytest.approx(0.5)
