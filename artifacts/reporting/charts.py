"""Charts of pages and cards. On a page they take the page's colours, in light and dark; in a card they are pictures."""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ...eval.statistics import Measurement
from .results import Row
from .sections import Figure

SERIES = {
    "base": "#2456a6", "edited": "#a3312a", "reference": "#0a6b4f", "suppressed": "#8a5f00", "locked": "#6b4a9e",
    "removed": "#5a6470",
}  # fmt: skip
"""A colour for each model, the same everywhere; a page's style sheet has them as variables."""
INK, FAINT = "#1c2024", "#888888"
DPI = 150

Point = tuple[float, float, float, float]
"""x, value, and both ends of its interval."""
Spread = tuple[float, float, float]
"""A value and both ends of its interval."""


def recovery(attacks: Sequence[dict[str, Any]], chance: float, axis: str = "right on group V") -> Any:
    """Accuracy against tokens seen, one panel an attack and one line a model, as a matplotlib figure."""
    columns = min(3, len(attacks))
    figure, panels = _panels(-(-len(attacks) // columns), columns)
    for axes, attack in zip(panels, attacks, strict=False):
        _label(axes, "tokens seen by the attacker", axis, title=attack["name"].replace("_", " "))
        for subject, colour in SERIES.items():
            points = [(point["tokens"], point[subject]) for point in attack["curve"] if subject in point]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=subject)
        axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle=":")
        # Logarithmic from the first tokens on, so that the untouched model has its place at 0.
        seen = [point["tokens"] for point in attack["curve"] if point["tokens"]]
        axes.set_xscale("symlog", linthresh=min(seen))
        marks = _round_numbers(min(seen), max(seen))
        axes.set_xticks([0, *marks], ["0", *(f"{mark:,}" for mark in marks)])
        axes.set_xticks([], minor=True)
        axes.set_xlim(left=0)
        _finish(axes)
    for axes in panels[len(attacks) :]:
        axes.set_visible(False)
    return figure


def by_layer(lines: Mapping[str, Sequence[Point]], y_label: str) -> Any:
    """A line with its interval for each model, layer by layer."""
    figure, (axes,) = _panels(1, 1)
    _label(axes, "layer", y_label)
    for subject, points in lines.items():
        layers, values, low, high = zip(*points, strict=True)
        axes.plot(layers, values, color=SERIES[subject], marker="o", markersize=3, label=subject)
        axes.fill_between(layers, low, high, color=SERIES[subject], alpha=0.15, linewidth=0)
    _finish(axes)
    return figure


def draw(figure: Figure) -> Markup:
    """The drawing of a section, for a page; a heat map is a table of the page itself.

    Raises:
        KeyError: It is of a kind that charts do not draw.
    """
    return svg(_KINDS[figure.kind](figure.data), figure.title)


def _bars(data: Mapping[str, Any]) -> Any:
    figure, (axes,) = _panels(1, 1)
    _label(axes, data["x"], data["y"])
    axes.bar(range(len(data["heights"])), data["heights"], color=SERIES["edited"])
    return figure


def _lines(data: Mapping[str, Any]) -> Any:
    figure, (axes,) = _panels(1, 1)
    _label(axes, data["x"], data["y"])
    for (name, points), subject in zip(data["lines"].items(), ("edited", "base", "reference"), strict=False):
        axes.plot(*zip(*points, strict=True), color=SERIES[subject], marker="o", markersize=3, label=name)
    if data["marker"] is not None:
        axes.axvline(data["marker"], color=FAINT, linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    _finish(axes)
    return figure


_KINDS = {"bars": _bars, "lines": _lines}


def trade_off(points: Sequence[tuple[str, bool, Spread, Spread]], x_label: str, y_label: str, title: str) -> Any:
    """What was given up for what was removed: a name, whether it is on the front, x and y with their intervals."""
    figure, (axes,) = _panels(1, 1, size=(7, 5))
    _label(axes, x_label, y_label, title=title)
    for name, front, x, y in points:
        ends = [[[value - low], [high - value]] for value, low, high in (x, y)]
        axes.errorbar(x[0], y[0], xerr=ends[0], yerr=ends[1], fmt="o" if front else "x", elinewidth=0.8, label=name)
    axes.legend(fontsize=8)
    return figure


def kinds_by_layer(lines: Mapping[str, Sequence[tuple[int, float]]], y_label: str, title: str) -> Any:
    """A line for each kind of tensor, layer by layer."""
    figure, (axes,) = _panels(1, 1, size=(7, 4))
    _label(axes, "layer", y_label, title=title)
    for kind, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=kind)
    if lines:
        axes.legend(fontsize=7)
    return figure


def watched(looks: Sequence[dict[str, Any]], chance: float) -> Any:
    """A concept while a model trained: accuracy, where its neurons sit, and their centre, look by look."""
    figure, (left, middle, right) = _panels(1, 3, size=(10, 3.6))
    steps = [look["step"] + 1 for look in looks]
    _label(left, "step", "multiple choice", title="Recovery")
    low, high = zip(*(look["accuracy"]["ci95"] for look in looks), strict=True)
    left.fill_between(steps, low, high, color=SERIES["edited"], alpha=0.15, linewidth=0)
    label = f"group V (n = {looks[0]['accuracy']['n']})"
    left.plot(steps, [look["accuracy"]["value"] for look in looks], color=SERIES["edited"], marker="o", label=label)
    left.plot(steps, [look["utility"] for look in looks], color=SERIES["base"], label="everything else")
    left.axhline(chance, color=FAINT, linewidth=0.8, linestyle=":")
    _finish(left)
    _label(middle, "step", "layer", title="Mean squared d' of neurons")
    by_look = zip(*(look["mass_by_layer"] for look in looks), strict=True)
    image = middle.imshow(list(by_look), aspect="auto", origin="lower", cmap="viridis")
    figure.colorbar(image, ax=middle)
    _label(right, "step", "layer", title="Where the concept sits")
    right.plot(steps, [look["centre_of_mass"] for look in looks], color=SERIES["edited"], marker="o", label="now")
    before = [look["centre_of_mass_before"] for look in looks]
    right.plot(steps, before, color=SERIES["base"], linestyle="--", label="same units before")
    right.legend(fontsize=7, frameon=False, labelcolor=INK)
    shown = range(0, len(looks), -(-len(looks) // 8))
    names = [str(looks[place]["step"]) for place in shown]
    middle.set_xticks(shown, names)
    for axes in (left, right):
        # Logarithmic, with a place for the look before the first step.
        axes.set_xscale("log")
        axes.set_xticks([steps[place] for place in shown], names)
        axes.set_xticks([], minor=True)
    return figure


def localized(grids: Mapping[str, Sequence[Sequence[float | None]]], columns: Sequence[str]) -> Any:
    """Layers by sites, one heat map a figure; blue restores or is needed, red pushes the other way."""
    layers = max(map(len, grids.values()))
    size = (1.2 + 0.42 * len(columns) * len(grids), 1.8 + 0.2 * layers)
    figure, panels = _panels(1, len(grids), size)
    for axes, (name, grid) in zip(panels, grids.items(), strict=True):
        _label(axes, "", "layer", title=name)
        values = [[math.nan if value is None else value for value in row] for row in grid]
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="RdBu", vmin=-1, vmax=1)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(0, layers, -(-layers // 16)))
    figure.colorbar(image, ax=panels, label="share of the answer")
    return figure


def svg(figure: Any, label: str) -> Markup:
    """A figure for a page: text stays text, ink and series follow the page's colours."""
    text = _svg(figure, label, transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for subject, colour in SERIES.items():
        text = text.replace(colour, f"var(--{subject})")
    text = text.replace(INK, "currentColor")
    # Only groups are named alike in every figure; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(label)}" ', 1))


def svg_file(figure: Any) -> str:
    """A figure as a file of its own, on white; the same figure gives the same text."""
    return _svg(figure, "excise")


def png(figure: Any) -> bytes:
    """A figure for a card, on white; the same figure gives the same bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    return drawn.getvalue()


def whiskers(row: Row) -> list[dict[str, Any]]:
    """Where each model's value and interval lie between a row's ends, in percent."""
    items: list[tuple[str, Measurement]] = [
        (subject, item)
        for subject, item in (("base", row.base), ("edited", row.edited), ("reference", row.reference))
        if item
    ]
    # A value without an interval is a dot without a line.
    ends = {subject: item.ci95 or (item.value, item.value) for subject, item in items}
    low, high = min(0.0, *(end[0] for end in ends.values())), max(end[1] for end in ends.values())
    high = 1.0 if low == 0 and high <= 1 else high
    width = (high - low) or 1.0
    return [
        {
            "subject": subject,
            **{
                key: round(100 * (value - low) / width, 2)
                for key, value in (("at", item.value), ("low", ends[subject][0]), ("high", ends[subject][1]))
            },
        }
        for subject, item in items
    ]


def _svg(figure: Any, salt: str, *, transparent: bool = False) -> str:
    """Names inside a drawing come of the salt alone, so that two drawings of a figure are one text."""
    import matplotlib

    drawn = io.BytesIO()
    salt = hashlib.sha256(salt.encode()).hexdigest()[:12]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        # Dates and versions would make every drawing another file.
        figure.savefig(drawn, format="svg", transparent=transparent, metadata={"Date": None, "Creator": None})
    return drawn.getvalue().decode()


def _panels(rows: int, columns: int, size: tuple[float, float] | None = None) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Made without pyplot, which keeps every figure alive in a global list.
    figure = Figure(figsize=size or (4.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _label(axes: Any, x_label: str, y_label: str, title: str = "") -> None:
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.set_title(title, color=INK, fontsize=9)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def _round_numbers(low: float, high: float) -> list[int]:
    """1, 2 and 5 times each power of ten in a range; the powers alone where those would be many."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    marks = [n * 10**power for power in powers for n in (1, 2, 5) if low <= n * 10**power <= high]
    return marks if len(marks) <= 6 else [10**power for power in powers if low <= 10**power]


def _finish(axes: Any) -> None:
    """Accuracies on one scale, so that panels compare at a glance."""
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7, loc="best", frameon=False, labelcolor=INK)
