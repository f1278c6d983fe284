"""The lines of a benchmark's table, and the table of several models."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...artifacts.reporting.outcomes import Shown
from ...artifacts.reporting.results import figure
from ...artifacts.reporting.terminal import aligned, bullets, terminal_width
from ...editing.errors import RequestError, nearest
from ...eval.concept import Concept
from ...eval.intervals import Interval
from ...eval.statistics import Better, Scores

Raw = Mapping[str, Scores]
"""Everything that was measured of one model, item by item, by name."""
CUT = "prompts that lost their beginning"
"""Name of 1 for each prompt that was longer than the model's context, else 0; no line of the table, but a note."""


@dataclass(frozen=True)
class Figure:
    """One value of one model, in the benchmark's words."""

    label: str
    value: float
    unit: str
    better: Better
    """Which direction is good for an edit; ``base`` if it should not change the value."""
    n: int
    """Items that it was counted of."""
    ci95: Interval | None
    """Over subjects where they are known; None where they are too few or all alike, and of a test."""
    skipped: int = 0

    def __str__(self) -> str:
        if self.unit in ("p-value", "distance"):
            return f"{self.value:.2e}" if 0 < self.value < 1e-3 else f"{self.value:.3f}"
        low, high = ("…", "…") if self.ci95 is None else map(figure, self.ci95)
        return f"{figure(self.value)} [{low}, {high}]"


def mean_of(label: str, scores: Scores | None, better: Better | None = None) -> list[Figure]:
    """The mean of what was measured; nothing where nothing was."""
    if scores is None or not scores.ids or scores.is_empty:
        return []
    return [
        Figure(
            label,
            scores.value(),
            scores.unit,
            better or scores.better,
            len(scores.ids),
            scores.interval(),
            scores.skipped,
        )
    ]


def has_file(concept: Concept, name: str) -> bool:
    """Whether a pack holds rows of a file itself; what was made of other rows is no part of a benchmark."""
    return f"{name}.jsonl" in concept.sha256 if concept.sha256 else bool(getattr(concept, name))


def joined(name: str, scores: Sequence[Scores]) -> Scores:
    """Scores of several splits as one, under a split's new name."""
    first = scores[0]
    return Scores(
        first.name,
        name,
        first.unit,
        first.better,
        tuple(key for one in scores for key in one.ids),
        tuple(value for one in scores for value in one.totals),
        tuple(weight for one in scores for weight in one.weights),
        skipped=sum(one.skipped for one in scores),
        clusters=tuple(cluster for one in scores for cluster in one.clusters),
    )


def column(scores: Scores, ids: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values of some items, and 1 where the item was measured, else 0."""
    values = dict(zip(scores.ids, scores.totals, strict=True))
    wanted = list(ids)
    return np.array([values.get(key, 0.0) for key in wanted]), np.array([float(key in values) for key in wanted])


@dataclass(frozen=True, repr=False)
class SuiteTable:
    """A benchmark's table: one column a model. It shows itself in a notebook."""

    suite: str
    concept: str
    models: Mapping[str, Sequence[Figure]]
    """Base first, and the reference last, where there are any."""
    notes: tuple[str, ...]
    """How prompts were asked, and what was left out."""

    @property
    def labels(self) -> list[str]:
        """The lines, in the benchmark's order: those of the model that has the most."""
        longest = max(self.models.values(), key=len)
        rest = [figure.label for figures in self.models.values() for figure in figures]
        return list(dict.fromkeys([*(figure.label for figure in longest), *rest]))

    def value(self, model: str, label: str) -> Figure:
        """One figure.

        Args:
            model: A column of the table.
            label: A line of the table.

        Raises:
            RequestError: There is none.
        """
        if model not in self.models:
            raise RequestError(
                f"no model {model!r}{nearest(model, list(self.models))}; models: {', '.join(self.models)}"
            )
        by_label = {figure.label: figure for figure in self.models[model]}
        if label not in by_label:
            raise RequestError(f"no line {label!r}{nearest(label, list(by_label))}; lines: {', '.join(by_label)}")
        return by_label[label]

    def __repr__(self) -> str:
        return f"SuiteTable({self.suite}, {', '.join(self.models)}: {len(self.labels)} lines)"

    def __str__(self) -> str:
        return self.text(terminal_width())

    def _repr_html_(self) -> str:
        header, rows = self._cells()
        return Shown(f"{self.suite.upper()} on {self.concept}", self.notes, header, rows).html()

    def text(self, width: int | None) -> str:
        """For a terminal."""
        header, rows = self._cells()
        return f"{aligned(header, rows, width)}\n\n{bullets(self.notes, width)}"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows."""
        by_model = {name: {one.label: one for one in figures} for name, figures in self.models.items()}
        rows = []
        for label in self.labels:
            cells = [of_model.get(label) for of_model in by_model.values()]
            some = next(one for one in cells if one)
            count = f"{some.n} ({some.skipped} skipped)" if some.skipped else str(some.n)
            rows.append([label, count, *("" if one is None else str(one) for one in cells)])
        return [self.suite.upper(), "n", *by_model], rows

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        models = {name: [asdict(figure) for figure in figures] for name, figures in self.models.items()}
        return {"suite": self.suite, "concept": self.concept, "models": models, "notes": list(self.notes)}
