"""How often intervals hold the truth, on simulated items whose truth is known.

    python benchmarks/intervals.py [--draws 1000] [--items 5,20,80,200,800] [--correlations 0,0.2,0.5]

Items stand four to a subject; at correlation 0 they are independent, and no subject is given. A rate is 0.125, a loss
0.1; margins are normal, divergences lognormal (sigma 1), and texts of a perplexity have lognormal lengths. Beside the
package's interval, in percent, stands what it replaced: Wilson and Tango over items, percentiles of a bootstrap over
items. ``none`` is where subjects are too few for an interval. The heavy divergences (lognormal, sigma 1.5) are those of
which a run mostly says that few items decide them. The standard error that is printed is that of a share of 95%.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import overload

import numpy as np
from excise.eval.intervals import paired_rate_difference, rate_interval, wilson
from excise.eval.ratios import ratio_difference, ratio_interval
from numpy.typing import NDArray

EACH = 4
"""Items of a subject."""
RATE, LOSS = 0.125, 0.1
Array = NDArray[np.float64]
Interval = tuple[float, float]


class Simulated:
    """Items of some subjects, with an intraclass correlation."""

    def __init__(self, rng: np.random.Generator, items: int, correlation: float):
        self.rng, self.items, self.correlation = rng, items, correlation
        self.subjects = np.arange(items) // EACH
        self.clusters = tuple(map(str, self.subjects)) if correlation else ()

    def hits(self, rate: float) -> Array:
        """Items that are right."""
        chance = np.full(self.items, rate)
        if self.correlation:
            share = (1 - self.correlation) / self.correlation
            chance = self.rng.beta(rate * share, (1 - rate) * share, size=self.items)[self.subjects]
        return (self.rng.random(self.items) < chance).astype(float)

    def normal(self) -> Array:
        """Values of mean 0 and variance 1."""
        common = self.rng.normal(size=self.items)[self.subjects]
        return math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * self.rng.normal(size=self.items)


def held(items: Simulated, draws: Array) -> dict[str, tuple[bool | None, bool]]:
    """For one draw of every figure, whether its interval holds the truth: the package's (None without one), and the one before."""
    ones, n, clusters = np.ones(items.items), items.items, items.clusters
    hits, lost = items.hits(RATE), items.hits(LOSS)
    margin, divergence = 2.5 + items.normal(), np.exp(items.normal() - 0.5)
    heavy = np.exp(1.5 * items.normal() - 1.125)
    tokens = np.ceil(items.rng.lognormal(3, 0.5, n))
    level = 3 + 0.3 * items.normal()
    later = level + 0.05 + 0.05 * items.normal()
    both = (later * tokens, tokens), (level * tokens, tokens)
    before = [np.exp((draws @ (each * tokens)) / (draws @ tokens)) for each in (later, level)]
    return {
        "rate": (_in(RATE, rate_interval(hits.tolist(), clusters)), _in(RATE, wilson(float(hits.sum()), n))),
        "loss": (
            _in(-LOSS, paired_rate_difference((1 - lost).tolist(), ones.tolist(), clusters).ci95),
            _in(-LOSS, _percentiles(-(draws @ lost) / n)),
        ),
        "margin": (_in(2.5, ratio_interval(margin, ones, clusters)), _in(2.5, _percentiles(draws @ margin / n))),
        "divergence": (
            _in(1.0, ratio_interval(divergence, ones, clusters)),
            _in(1.0, _percentiles(draws @ divergence / n)),
        ),
        "heavy divergence": (
            _in(1.0, ratio_interval(heavy, ones, clusters)),
            _in(1.0, _percentiles(draws @ heavy / n)),
        ),
        "perplexity": (
            _in(math.exp(3), ratio_interval(*both[1], clusters, exponential=True)),
            _in(math.exp(3), _percentiles(before[1])),
        ),
        "its change": (
            _in(math.exp(3.05) - math.exp(3), ratio_difference(*both, clusters, exponential=True).ci95),
            _in(math.exp(3.05) - math.exp(3), _percentiles(before[0] - before[1])),
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print how often intervals hold the truth, by figure, number of items and correlation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--items", default="5,20,80,200,800")
    parser.add_argument("--correlations", default="0,0.2,0.5")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    error = 100 * math.sqrt(0.95 * 0.05 / options.draws)
    print(
        f"percent of {options.draws} intervals that hold the truth (what it replaced); standard error {error:.1f} points"
    )
    print(f"{'correlation':>11}{'n':>5}")
    for correlation in map(float, options.correlations.split(",")):
        for n in map(int, options.items.split(",")):
            rng = np.random.default_rng([n, round(100 * correlation)])
            draws = rng.multinomial(n, np.full(n, 1 / n), size=1000).astype(float)
            now: Counter[str] = Counter()
            before: Counter[str] = Counter()
            missing: Counter[str] = Counter()
            for _ in range(options.draws):
                for figure, (holds, held_before) in held(Simulated(rng, n, correlation), draws).items():
                    now[figure] += bool(holds)
                    missing[figure] += holds is None
                    before[figure] += held_before
            cells = (
                f"{name} {_percent(now[name], options.draws - missing[name])} ({_percent(before[name], options.draws)})"
                for name in now
            )
            print(f"{correlation:11.1f}{n:5}   {'  '.join(cells)}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")


@overload
def _in(truth: float, interval: Interval) -> bool: ...
@overload
def _in(truth: float, interval: None) -> None: ...
@overload
def _in(truth: float, interval: Interval | None) -> bool | None: ...
def _in(truth: float, interval: Interval | None) -> bool | None:
    return None if interval is None else interval[0] <= truth <= interval[1]


def _percent(count: int, of: int) -> str:
    return f"{100 * count / of:.0f}" if of else "none"


def _percentiles(values: Array) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
