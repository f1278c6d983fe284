"""Runs side by side: what the table says beyond the figures it copies."""

import numpy as np
from excise.eval.intervals import wilson
from excise.eval.statistics import Measurement
from excise.recipes.compare import Line


def _line(right, n):
    values = {
        split: Measurement(
            "multiple_choice", split, "edited", hits / n[split], "share", "higher", n[split], 0, wilson(hits, n[split])
        )
        for split, hits in right.items()
    }
    return Line("run", "elm", values, None)


def test_the_interval_of_what_was_kept_covers_it_in_about_95_of_100_draws():
    rng = np.random.default_rng(0)
    n, truth = {"neighbour": 160, "retain": 480}, {"neighbour": 0.97, "retain": 0.8}
    mean = sum(truth.values()) / 2
    covered, averaged = 0, 0
    for _ in range(2000):
        line = _line({split: int(rng.binomial(n[split], truth[split])) for split in n}, n)
        low, high = line.kept_ci95()
        assert low < line.kept() < high
        covered += low <= mean <= high
        ends = [item.ci95 for item in line.values.values()]
        averaged += sum(low for low, _ in ends) / 2 <= mean <= sum(high for _, high in ends) / 2
    assert 0.94 < covered / 2000 < 0.965
    # Both ends averaged would be an interval of parts that err together, and claim less than was measured.
    assert averaged / 2000 > 0.98


def test_one_part_alone_keeps_its_own_interval():
    line = _line({"neighbour": 156}, {"neighbour": 160})
    assert np.allclose(line.kept_ci95(), line.values["neighbour"].ci95)
