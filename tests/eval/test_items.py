"""Items of one subject: which belong together, how some of them are drawn, and what they tell of a rate or a mean."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from excise.artifacts.concepts import load_concept
from excise.eval.concept import Prompt, RetainText
from excise.eval.drawing import drawn
from excise.eval.inference.questions import questions_by_split
from excise.eval.intervals import effective_size, paired_rate_difference, rate_interval, student, wilson
from excise.eval.items import clusters_of
from excise.eval.measurements.cloze import recitals
from excise.eval.measurements.perplexity import texts
from excise.eval.model_under_test import EvalSettings
from excise.eval.ratios import SEED, ratio_difference, ratio_interval
from oracle import intervals as oracle

SUBJECTS, EACH = 20, 4
OF = tuple(str(place // EACH) for place in range(SUBJECTS * EACH))
POTIONS = load_concept("builtin:potions")


def _hits(rng, rate, correlation):
    """Answers to four questions on each of 20 subjects, whose intraclass correlation is as given."""
    share = (1 - correlation) / correlation
    of_subject = rng.beta(rate * share, (1 - rate) * share, size=(SUBJECTS, 1))
    return (rng.random((SUBJECTS, EACH)) < of_subject).astype(float).ravel().tolist()


@pytest.mark.parametrize("rate", [0.125, 0.5])
def test_rates_of_clustered_questions_hold_the_truth_where_independent_ones_do_not(rate):
    rng, held = np.random.default_rng(0), Counter()
    for _ in range(400):
        hits = _hits(rng, rate, 0.5)
        for way, clusters in (("by subject", OF), ("by question", ())):
            low, high = rate_interval(hits, clusters)
            held[way] += low <= rate <= high
    assert held["by subject"] >= 0.93 * 400 and held["by question"] < 0.86 * 400


def test_differences_of_clustered_questions_hold_the_truth_where_independent_ones_do_not():
    rng, held = np.random.default_rng(1), Counter()
    for _ in range(400):
        lost = _hits(rng, 0.2, 0.5)
        base, edited = [1.0] * len(lost), [1 - value for value in lost]
        for way, clusters in (("by subject", OF), ("by question", ())):
            low, high = paired_rate_difference(edited, base, clusters).ci95
            held[way] += low <= -0.2 <= high
    assert held["by subject"] >= 0.93 * 400 and held["by question"] < 0.86 * 400


def test_means_of_clustered_items_hold_the_truth_where_independent_ones_do_not():
    rng, held, ones = np.random.default_rng(2), Counter(), [1.0] * len(OF)
    for _ in range(120):
        of_subject = rng.normal(size=(SUBJECTS, 1)) + rng.normal(size=(SUBJECTS, EACH))
        values = (2.5 + of_subject).ravel().tolist()
        for way, clusters in (("by subject", OF), ("by item", ())):
            low, high = ratio_interval(values, ones, clusters)
            held[way, "mean"] += low <= 2.5 <= high
            zero = [0.0] * len(values)
            low, high = ratio_difference((values, ones), (zero, ones), clusters).ci95
            held[way, "difference"] += low <= 2.5 <= high
    for figure in ("mean", "difference"):
        assert held["by subject", figure] >= 0.92 * 120 and held["by item", figure] < 0.86 * 120


def test_without_a_known_subject_or_with_one_alone_items_are_independent():
    hits = [1.0] * 30 + [0.0] * 10
    assert effective_size(hits) == effective_size(hits, ["one"] * 40) == effective_size(hits, range(40)) == 40
    assert rate_interval(hits) == wilson(30, 40)
    # Four that always agree are one, but for what ten subjects leave unknown of that.
    alike = [float(place % 8 < 4) for place in range(40)]
    subjects = [place // 4 for place in range(40)]
    assert effective_size(alike, subjects) < 10 < effective_size(hits[::-1], list(range(20)) * 2)
    assert effective_size([0.0] * 40, subjects) == 10


def test_effective_numbers_and_points_of_students_t_are_those_of_their_definitions():
    rng = np.random.default_rng(3)
    for freedom in (1, 2, 3, 8, 31):
        assert student(freedom) == pytest.approx(oracle.student(freedom), abs=2e-3)
    for _ in range(30):
        subjects = [str(rng.integers(6)) for _ in range(25)] + ["0", "1"]
        values = rng.integers(0, 2, size=27).astype(float).tolist()
        assert effective_size(values, subjects) == pytest.approx(oracle.items_in_effect(values, subjects), rel=5e-3)


def test_intervals_of_ratios_are_those_of_a_loop_over_the_same_draws():
    rng = np.random.default_rng(4)
    subjects = [str(place) for place in rng.integers(12, size=40)]
    totals, weights = rng.exponential(3, size=40).tolist(), rng.integers(1, 9, size=40).astype(float).tolist()
    n = len(set(subjects))
    draws = np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), size=2000).tolist()
    expected = oracle.ratio_interval(totals, weights, subjects, draws)
    assert ratio_interval(totals, weights, subjects) == pytest.approx(expected, rel=2e-3)
    # In reverse the large values are negative, and none has a logarithm.
    low, high = ratio_interval([-total for total in totals], weights, subjects)
    assert -low < expected[1] and -high == pytest.approx(expected[0], rel=2e-3)
    changed = (rng.exponential(3, size=40).tolist(), rng.integers(1, 9, size=40).astype(float).tolist())
    wanted = oracle.perplexity_difference((totals, weights), changed, subjects, draws)
    found = ratio_difference((totals, weights), changed, subjects, exponential=True).ci95
    assert found == pytest.approx(wanted, rel=2e-3)


def test_means_hold_the_truth_where_one_subject_has_most_of_the_items():
    """The linearized error of such a mean is too small; the jackknife's is not."""
    rng, held = np.random.default_rng(5), Counter()
    sizes = (20, 3, 3, 2, 2)
    subjects = [str(place) for place, size in enumerate(sizes) for _ in range(size)]
    for _ in range(400):
        values = np.repeat(rng.normal(size=5), sizes) + 0.5 * rng.normal(size=len(subjects))
        low, high = ratio_interval(values, np.ones(len(subjects)), subjects)
        held["jackknife"] += low <= 0 <= high
        residuals = np.bincount(np.repeat(range(5), sizes), weights=values - values.mean())
        error = math.sqrt(5 / 4 * (residuals**2).sum()) / len(subjects)
        held["linearized"] += abs(values.mean()) <= student(4) * error
    assert held["jackknife"] >= 0.93 * 400 and held["linearized"] < 0.86 * 400


def test_subjects_with_nothing_counted_do_not_add_to_their_number():
    totals, weights = [1.0, 2.0, 4.0, 3.0, 7.0, 5.0], [1.0, 2.0, 2.0, 1.0, 3.0, 4.0]
    assert ratio_interval([*totals, 0.0, 0.0], [*weights, 0.0, 0.0]) == ratio_interval(totals, weights)
    assert ratio_interval([*totals[:4], 0.0, 0.0], [*weights[:4], 0.0, 0.0]) is None


def test_a_draw_takes_every_item_alike_and_as_many_subjects_as_can_be():
    rows = list(range(60))
    # Subjects of 1 to 11 items.
    clusters = [str(math.isqrt(2 * place)) for place in rows]
    seen = Counter(row for seed in range(3000) for row in drawn(rows, clusters, 12, str(seed)))
    assert max(seen.values()) < 1.25 * 600 and min(seen.values()) > 0.75 * 600
    assert drawn(rows, clusters, 12, "0") == drawn(rows, clusters, 12, "0") == sorted(drawn(rows, clusters, 12, "0"))
    assert drawn(rows, clusters, 0, "0") == drawn(rows, clusters, 60, "0") == rows


def test_twenty_of_the_questions_are_on_twenty_subjects_and_the_first_twenty_on_five():
    for items in questions_by_split(POTIONS, 20).values():
        assert len(items) == 20 == len({question.subject for question in items})
    assert len({question.subject for question in POTIONS.questions[:20]}) == 5
    settings = EvalSettings(questions=20)
    for chosen in (texts(POTIONS, settings), list(recitals(POTIONS, settings, "V"))):
        assert len(chosen) == 20 == len(set(clusters_of(POTIONS, chosen)))
    assert len(set(clusters_of(POTIONS, POTIONS.retain[:20]))) < 5


def test_rows_without_a_subject_belong_to_the_one_that_their_text_names_or_to_none():
    (known,) = {q.subject for q in POTIONS.questions if q.id == "traipar-colour"}
    named = Prompt(id="a", prompt=f"Tell me of {known}, please")
    part = RetainText(id="b", text=f"The {known}s are many.")
    window = RetainText(id="c", text="Nothing else.", subject="book 1")
    again = RetainText(id="d", text="The same words.")
    rows = (named, part, window, again, replace_id(again, "e"))
    assert clusters_of(POTIONS, rows) == (known, part.text, "book 1", again.text, again.text)
    assert clusters_of(replace(POTIONS, questions=(), forget=()), rows[:2]) == (named.prompt, part.text)


def replace_id(row, name):
    return row.model_copy(update={"id": name})
