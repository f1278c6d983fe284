"""A verdict for each format; formats that disagree are a finding."""

import math

import numpy as np
import pytest
from excise.eval.audit.formats import NONE, OF_BEHAVIOUR, bits, format_findings, judge_format

N = 60


def _right(share):
    return [float(place < share * N) for place in range(N)]


def _judged(before, after, *, floor=0.1, floor_after=None, base=1.0, chance=0.125, name="multiple_choice"):
    edited = {NONE: _right(before), "rtt": _right(after)}
    never = {NONE: _right(floor), "rtt": _right(floor if floor_after is None else floor_after)}
    return judge_format(name, "", chance, _right(base), edited, never)


@pytest.mark.parametrize(
    ("figures", "outcome"),
    [
        ({"before": 0.1, "after": 0.7}, "recovers"),
        ({"before": 0.1, "after": 0.28, "floor": 0.05}, "told_apart"),
        ({"before": 0.1, "after": 0.12}, "not_shown"),
        # What is there before any attack counts too.
        ({"before": 0.7, "after": 0.1}, "recovers"),
        # An attack that gives the floor what the base knows brings nothing back that was left.
        ({"before": 0.1, "after": 0.95, "floor_after": 0.95}, "not_shown"),
        ({"before": 0.1, "after": 0.28, "base": 0.3}, "not_answered"),
        # Of 60 questions .42 do not surely lie .2 above one in eight.
        ({"before": 0.1, "after": 0.4, "base": 0.42}, "not_answered"),
    ],
)
def test_each_format_has_its_own_verdict(figures, outcome):
    judged = _judged(**figures)
    assert judged.outcome == outcome
    assert judged.edited == pytest.approx(max(figures["before"], figures["after"]), abs=0.02)
    assert judged.attack == ("rtt" if figures["after"] > figures["before"] else NONE) and judged.n == N


def test_questions_that_cannot_be_asked_so_are_left_out_of_all_models():
    base = [math.nan if place % 2 else 1.0 for place in range(N)]
    judged = judge_format("reversed", "", 0.25, base, {NONE: _right(0.5)}, {NONE: _right(0.0)})
    assert judged.n == N // 2 and judged.base == 1 and judged.edited == 0.5
    assert judge_format("reversed", "", 0.25, [math.nan] * N, {NONE: _right(0.5)}, {NONE: _right(0)}) is None


def test_a_floor_on_fewer_questions_of_its_own_is_compared_as_few():
    edited, base = {NONE: _right(0.6)}, _right(1.0)
    few, many = {NONE: [1.0] * 3 + [0.0] * 9}, {NONE: _right(0.25)}
    narrow, wide = (judge_format("reversed", "", 0.125, base, edited, floor) for floor in (many, few))
    assert narrow.floor == wide.floor == 0.25 and narrow.n == wide.n == N
    widths = [high - low for low, high in (one.regained.ci95 for one in (narrow, wide))]
    assert widths[1] > 1.3 * widths[0]
    some = {NONE: [math.nan, *few[NONE][1:]]}
    assert judge_format("reversed", "", 0.125, base, edited, some).floor == pytest.approx(2 / 11)


def test_formats_that_disagree_are_said_and_those_that_agree_too():
    back, away = _judged(0.1, 0.7), _judged(0.1, 0.12, name="open_answer")
    (said,) = format_findings([back, away])
    assert said.startswith("Formats disagree") and "recovers as multiple choice (0.700 under rtt" in said
    assert "not shown as open answer" in said
    (alike,) = format_findings([back, back])
    assert alike.startswith("In all 2 formats") and "knowledge recovers" in alike
    (of_behaviour,) = format_findings([back, away], OF_BEHAVIOUR)
    assert of_behaviour.startswith("Formats disagree: the behaviour recovers as") and "knowledge" not in of_behaviour
    silent = _judged(0.1, 0.3, base=0.2, name="true_false")
    said = format_findings([back, away, silent])
    assert len(said) == 2 and "does not surely answer" in said[0] and "true false" not in said[1]


def test_bits_are_the_mean_of_log_ratios():
    rng = np.random.default_rng(0)
    before, after = rng.random(20), rng.random(20)
    mean = sum(math.log2(after[place]) - math.log2(before[place]) for place in range(20)) / 20
    assert bits(before, after) == pytest.approx(mean)
    assert bits(before, before) == 0 and bits([0.0], [0.5]) is None
