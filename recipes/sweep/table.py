"""What a sweep found: of each combination the mean over seeds, with Student's t interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...artifacts.reporting.outcomes import Run
from ...artifacts.reporting.terminal import aligned
from ...editing.errors import counted
from ...eval.intervals import Interval, student
from ...eval.measurements import columns
from ..jobs.job import Outcome
from .request import Combination, SweepJob

DISTANCES = {"KL, neutral": ("kl_from_base", "neutral"), "KL, retain": ("kl_from_base", "retain")}
"""What a sweep shows beside the columns of `excise compare`: how far from its base the model is."""

MAIN = ("forget V", "flipped", "declines", "neighbour", "retain", "KL, neutral")
"""What a narrow terminal shows."""


@dataclass(frozen=True)
class Mean:
    """Of one measurement over the seeds of a combination."""

    value: float
    ci95: Interval | None
    """Student's t, over seeds; None for one seed."""
    values: tuple[float, ...]
    """In the order of the seeds."""

    def __str__(self) -> str:
        half = "" if self.ci95 is None else f" ±{self.ci95[1] - self.value:.3f}"
        return f"{self.value:.3f}{half}"


@dataclass(frozen=True)
class Line:
    """One combination."""

    combination: Combination
    seeds: tuple[int, ...]
    """Those that finished."""
    failed: Mapping[int, str]
    """Of the others, the line they failed with."""
    means: Mapping[str, Mean]
    """By heading of the measurement."""


def mean_of(values: Sequence[float]) -> Mean:
    """Mean with the interval of seeds: mean +- t(n - 1) s / sqrt(n).

    It tells how much another seed would change the figure, not how much other questions would.

    Example:
        >>> str(mean_of([0.2, 0.3, 0.4]))
        '0.300 ±0.248'
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(mean, None, tuple(values))
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student(n - 1) * deviation / math.sqrt(n)
    return Mean(mean, (mean - half, mean + half), tuple(values))


def lines_of(job: SweepJob, outcomes: Sequence[Outcome]) -> tuple[list[Line], dict[str, float]]:
    """The lines of a table, and the base's values where all runs share it."""
    by_name = {outcome.job.name: outcome for outcome in outcomes}
    lines, bases = [], []
    for one in job.combinations:
        of_seed = {seed: by_name[job.run_of(one, seed).name] for seed in job.settings.seeds}
        runs = {seed: Run.read(outcome.job.out) for seed, outcome in of_seed.items() if not outcome.failed}
        found = [_values(run, "edited") for run in runs.values()]
        bases += [_values(run, "base") for run in runs.values()]
        # A mean over some of the seeds would be of other runs than the rest of its line.
        shared = [name for name in figures() if found and all(name in values for values in found)]
        means = {name: mean_of([values[name] for values in found]) for name in shared}
        failed = {seed: outcome.error for seed, outcome in of_seed.items() if outcome.failed}
        lines.append(Line(one, tuple(runs), failed, means))
    return lines, bases[0] if bases and all(base == bases[0] for base in bases) else {}


def figures() -> dict[str, tuple[str, str]]:
    """Headings, each with its measurement and split."""
    return {**columns(), **DISTANCES}


def headings(lines: Sequence[Line]) -> list[str]:
    """The measurements that any line has."""
    return [name for name in figures() if any(name in line.means for line in lines)]


def as_json(job: SweepJob, lines: Sequence[Line], base: Mapping[str, float]) -> dict[str, Any]:
    """The content of ``results.json``."""
    settings = job.settings
    return {
        "recipe": settings.recipe,
        "model": settings.model,
        "concept": settings.concept,
        "seeds": settings.seeds,
        "base": dict(base),
        "combinations": [
            {
                "name": line.combination.name,
                "set": dict(line.combination.values),
                "finished": list(line.seeds),
                "failed": {str(seed): error for seed, error in line.failed.items()},
                "values": {
                    name: {
                        "mean": mean.value,
                        "ci95": mean.ci95 and list(mean.ci95),
                        "n": len(mean.values),
                        "values": list(mean.values),
                    }
                    for name, mean in line.means.items()
                },
            }
            for line in lines
        ],
    }


def text(lines: Sequence[Line], base: Mapping[str, float], width: int | None) -> str:
    """The table for a terminal, with as many figures as it holds; all of them where there is none."""
    names = headings(lines)
    shown = list(names)
    while width is not None and len(shown) > 1 and _widest(lines, base, shown) > width:
        # Those that matter most stay, in the order of the table.
        shown.remove(max(shown, key=lambda name: (name not in MAIN, names.index(name))))
    table = aligned(["settings", "seeds", *shown], _rows(lines, base, shown), width)
    notes = ["± is half of Student's 95% interval over seeds"] if any(len(line.seeds) > 1 for line in lines) else []
    notes += (
        [counted(len(names) - len(shown), "more figure is", "more figures are") + " in results.json"]
        if len(shown) < len(names)
        else []
    )
    return "\n".join([table, *notes])


def _widest(lines: Sequence[Line], base: Mapping[str, float], names: Sequence[str]) -> int:
    table = aligned(["settings", "seeds", *names], _rows(lines, base, names), None)
    return max(map(len, table.splitlines()))


def _rows(lines: Sequence[Line], base: Mapping[str, float], names: Sequence[str]) -> list[list[str]]:
    table = [["base", "", *(f"{base[name]:.3f}" if name in base else "" for name in names)]] if base else []
    for line in lines:
        count = str(len(line.seeds)) + (f", {len(line.failed)} failed" if line.failed else "")
        values = [str(line.means[name]) if name in line.means else "" for name in names]
        table.append([line.combination.name or "all runs", count, *values])
    return table


def _values(run: Run, subject: str) -> dict[str, float]:
    measured = {(item.name, item.split): item.value for item in run.measurements if item.subject == subject}
    return {name: measured[key] for name, key in figures().items() if key in measured}
