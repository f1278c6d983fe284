"""What a method says of itself, as data: ``story`` in ``eval.json``, which card, report and terminal render.

Texts are plain English with the three marks that both a card and a page understand: ``**bold**``, ``*emphasis*`` and
`` `code` ``. Cells of tables are plain text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ...eval.statistics import Measurement

Where = Literal["card", "report"]
Kind = Literal["bars", "lines", "heat_map"]


@dataclass(frozen=True)
class Table:
    """Plain text in rows and columns."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    chosen: int | None = None
    """The row that a page outlines."""


@dataclass(frozen=True)
class Figure:
    """A drawing of a page; a card has none. Make one with ``bars``, ``lines`` or ``heat_map``."""

    kind: Kind
    title: str
    about: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    where: tuple[Where, ...] = ("card", "report")


@dataclass(frozen=True)
class Control:
    """The same measurements after another edit of the same kind, such as one with random directions."""

    name: str
    """What was done instead, as it reads behind a semicolon: "without ablation"."""
    values: tuple[Measurement, ...]
    in_findings: bool = False
    """Whether findings name its values beside the edit's."""


@dataclass(frozen=True)
class Story:
    """Everything that a recipe says of its run, beyond the measurements that all recipes share."""

    headline: str = ""
    """What was edited, in one or two sentences: the card's first paragraph."""
    findings: tuple[str, ...] = ()
    """One line each, behind those that the measurements give."""
    warnings: tuple[str, ...] = ()
    """What a reader must know before trusting the result; one line each."""
    limits: tuple[str, ...] = ()
    """What the method cannot do; one sentence each."""
    sections: tuple[Section, ...] = ()
    controls: tuple[Control, ...] = ()
    tags: tuple[str, ...] = field(default=())
    """By which the Hub sorts the model."""

    def as_json(self) -> dict[str, Any]:
        """Plain data, as ``eval.json`` holds it."""
        return asdict(self)


def read_story(results: Mapping[str, Any]) -> Story:
    """The story of an ``eval.json``; an empty one where there is none, as in files of version 1."""
    content = results.get("story")
    if not content:
        return Story()
    texts = {name: tuple(content[name]) for name in ("findings", "warnings", "limits", "tags")}
    return Story(
        content["headline"],
        **texts,
        sections=tuple(_section(section) for section in content["sections"]),
        controls=tuple(
            Control(one["name"], tuple(measurement_from(item) for item in one["values"]), one["in_findings"])
            for one in content["controls"]
        ),
    )


def measurement_from(content: Mapping[str, Any]) -> Measurement:
    """A measurement that was read from JSON."""
    return Measurement(**{**content, "ci95": content["ci95"] and tuple(content["ci95"])})


def bars(title: str, about: str, heights: Sequence[float], x_label: str, y_label: str) -> Figure:
    """One bar for each layer."""
    return Figure("bars", title, about, {"heights": list(heights), "x": x_label, "y": y_label})


def lines(
    title: str,
    about: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    marker: float | None = None,
) -> Figure:
    """Named lines over a logarithmic axis that begins at 0.

    Args:
        points: ``(x, y)`` of each line; at most three lines.
        marker: The x that was used.
    """
    named = {name: [list(point) for point in line] for name, line in points.items()}
    return Figure("lines", title, about, {"lines": named, "x": x_label, "y": y_label, "marker": marker})


def heat_map(
    title: str,
    about: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    notes: Sequence[Sequence[str]],
    chosen: tuple[int, int] | None,
    *,
    higher_is_better: bool,
) -> Figure:
    """Numbers in a grid whose colours say how good they are.

    Args:
        rows: Names of the rows; the first is what they are rows of, so there is one more than rows of values.
        values: Row by row; None where there is none.
        notes: What the reader sees on hover, for each value.
        chosen: Row and column of the value that was used.
    """
    data = {
        "corner": rows[0],
        "rows": list(rows[1:]),
        "columns": list(columns),
        "values": [list(row) for row in values],
        "notes": [list(row) for row in notes],
        "chosen": None if chosen is None else list(chosen),
        "higher_is_better": higher_is_better,
    }
    return Figure("heat_map", title, about, data)


def _section(content: Mapping[str, Any]) -> Section:
    return Section(
        content["title"],
        tuple(content["paragraphs"]),
        tuple(Table(tuple(t["headers"]), tuple(map(tuple, t["rows"])), t["chosen"]) for t in content["tables"]),
        tuple(Figure(**figure) for figure in content["figures"]),
        tuple(content["where"]),
    )
