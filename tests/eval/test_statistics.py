import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from excise.artifacts.reporting.results import (
    dominated,
    format_difference,
    format_value,
    measurements_as_json,
    not_measured,
    summarize_all,
)
from excise.editing.errors import ExciseError
from excise.eval.intervals import tango, wilson
from excise.eval.statistics import Scores, summarize
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
    difference = _scores(better).difference(_scores(base))
    low, high = difference.ci95
    assert difference.value == pytest.approx(1 / 200)
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
        low, high = edited.difference(base).ci95
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


def _lognormal_coverage(n, level):
    """How often in 100 the interval of a mean holds 1, and Student's t and a percentile bootstrap hold it."""
    rng, held = np.random.default_rng(n), {"ours": 0, "percentile": 0}
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000) / n
    for _ in range(300):
        values = rng.lognormal(-level * level / 2, level, n)
        low, high = _scores(values).interval()
        held["ours"] += low <= 1 <= high
        low, high = np.percentile(draws @ values, [2.5, 97.5])
        held["percentile"] += low <= 1 <= high
    return {way: count / 3 for way, count in held.items()}


@pytest.mark.parametrize("n", [5, 10, 40])
def test_means_of_skewed_items_hold_the_truth_where_a_percentile_bootstrap_does_not(n):
    held = _lognormal_coverage(n, 1.0)
    assert held["ours"] >= 91 and held["ours"] > held["percentile"] + (2 if n == 40 else 8)


def test_margins_of_five_questions_hold_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = _scores(rng.normal(2.5, 1, 5)).interval()
        held += low <= 2.5 <= high
    assert held >= 0.93 * 300


def test_paired_perplexities_hold_the_true_difference():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = np.ceil(rng.lognormal(3, 0.5, 20)).tolist()
        level = 3 + 0.2 * rng.normal(size=20)
        base = _scores(level * tokens, tokens, exponential=True)
        edited = _scores((level + rng.normal(0.05, 0.05, 20)) * tokens, tokens, exponential=True)
        low, high = edited.difference(base).ci95
        # The level of a text does not depend on its length, so the mean per token is that of texts.
        held += low <= math.exp(3.05) - math.exp(3) <= high
    assert held >= 0.9 * 200


def test_one_item_or_items_that_are_all_the_same_tell_of_no_interval_and_none_is_shown():
    single = _scores([2.5])
    same = _scores([0.25] * 8, exponential=True)
    assert single.interval() is same.interval() is None
    shown = summarize(single, "edited", _scores([2.0]))
    assert format_value(shown) == "2.500 […, …]" and format_difference(shown) == "+0.500 […, …]"
    assert shown.difference["p"] == 1 and json.loads(json.dumps(measurements_as_json([shown])))[0]["ci95"] is None
    # What base and edited have in common cancels to rounding, whose error is 0 by one formula and not by another.
    few = _scores([0.0, 0.0, 0.0, 0.0, 2.5649493574615367, 1.3862943611198906, 0.0, 0.0], exponential=True)
    assert summarize(few, "edited", few).difference == {"value": 0.0, "ci95": None, "p": 1.0}
    # A rate of one item has one: it is bounded.
    assert _scores([1.0]).interval() == wilson(1, 1)
    low, high = _scores([0.25] * 7 + [0.26]).interval()
    assert 0 <= low < 0.25125 < high


def test_an_interval_never_leaves_what_values_can_be():
    shares = Scores("m", "s", "share of words", "base", tuple("abcde"), (9.0, 9.0, 10.0, 10.0, 10.0), (10.0,) * 5)
    assert shares.interval()[1] == 1
    assert (
        _scores([0.0, 0.0, 0.1, 0.0, 5.0]).interval()[0] == 0
        and _scores([0.0, 0.1, 0.0, 0.2, 5.0], exponential=True).interval()[0] == 1
    )
    assert _scores([-0.1, -0.2, -0.1, -0.2, -5.0]).interval()[1] == 0
    # Margins may have either sign.
    assert _scores([-1.0, 0.1, 1.0, 0.2, 0.0]).interval()[0] < -0.5


def test_a_figure_that_few_long_texts_decide_says_so():
    long = _scores([300.0, 2.0, 3.0, 1.0, 2.0], [100, 1, 1, 1, 1], exponential=True)
    even = _scores([3.0, 2.0, 3.0, 1.0, 2.0], [4, 3, 3, 2, 3], exponential=True)
    (said,) = dominated({"base": [long, even], "edited": [long]})
    assert said.endswith("m (s), 1 of 5.")
    # A rate has a sound interval however few items were right.
    rare = _scores([1.0] + [0.0] * 30)
    assert not dominated({"base": [even, rare, _scores([1.0]), _scores([0.0, 0.0], [0, 0])]})


def test_a_figure_that_few_large_values_decide_says_so_by_subject():
    even, heavy = [1.0] * 40, [50.0] + [1.0] * 39
    subjects = tuple(str(place // 4) for place in range(40))
    assert dominated({"base": [_scores(heavy)]}) == [
        "Few items hold half of what is counted, so that the interval may be too narrow: m (s), 1 of 40."
    ]
    by_subject = _scores(heavy, clusters=subjects)
    # One sentence for all that is alike, and of several models the worst.
    other, milder = replace(by_subject, name="o"), _scores([9.0, 9.0, *even[2:]], clusters=subjects)
    assert dominated({"base": [milder]}) == []
    (said,) = dominated({"base": [by_subject, other], "edited": [by_subject]})
    assert said == (
        "Few subjects hold half of what is counted, so that the interval may be too narrow: m (s), 1 of 10; o (s), 1 of 10."
    )
    # Values of either sign cancel, so that none holds a share of their sum.
    assert not dominated({"base": [_scores(even), _scores([-50.0, *even[1:]])]})


def test_lognormal_values_are_said_to_be_decided_by_few_where_their_tail_is_too_heavy_for_any_interval():
    rng, said = np.random.default_rng(0), {}
    for sigma in (0.5, 1.0, 2.0):
        said[sigma] = sum(bool(dominated({"base": [_scores(rng.lognormal(0, sigma, 80))]})) for _ in range(100))
    assert said[0.5] == 0 and said[1.0] < 30 and said[2.0] > 95


def test_fewer_than_five_subjects_have_no_interval_of_a_mean_and_it_is_said():
    values, subjects = [1.0, 2.0, 4.0, 3.0, 7.0, 5.0, 2.0, 6.0], tuple("aabbccdd")
    few = _scores(values, clusters=subjects)
    assert few.interval() is None and few.difference(_scores([0.0] * 8, clusters=subjects)).ci95 is None
    assert dominated({"edited": [few]}) == ["Too few subjects for an interval, which needs at least 5: m (s), 4."]
    more = _scores(values, clusters=tuple("aabbccde"))
    assert more.interval() is not None and not dominated({"edited": [more]})
    # Where all share one subject, its items are what there is to draw from; a rate has bounds of its own.
    assert _scores(values, clusters=("a",) * 8).interval() is not None
    assert _scores([1.0, 0.0] * 4, clusters=subjects).interval() is not None
