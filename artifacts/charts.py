"""Charts of pages and cards. On a page they take the page's colours, in light and dark; in a card they are pictures."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..eval.statistics import Measurement
from .results import Row

SERIES = {"base": "#2456a6", "edited": "#a3312a", "never": "#0a6b4f", "suppressed": "#8a5f00"}
"""A colour for each model, the same everywhere; a page's style sheet has them as variables."""
INK, FAINT = "#1c2024", "#888888"
DPI = 150

Point = tuple[float, float, float, float]
"""x, value, and both ends of its interval."""


def recovery(attacks: Sequence[dict[str, Any]], chance: float) -> Any:
    """Accuracy against tokens seen, one panel an attack and one line a model, as a matplotlib figure."""
    columns = min(3, len(attacks))
    figure, panels = _panels(-(-len(attacks) // columns), columns)
    for axes, attack in zip(panels, attacks, strict=False):
        _label(axes, "tokens seen by the attacker", "right on group V", title=attack["name"].replace("_", " "))
        for subject, colour in SERIES.items():
            points = [(point["tokens"], point[subject]) for point in attack["curve"] if subject in point]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=subject)
        axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle=":")
        # Logarithmic from the first tokens on, so that the untouched model has its place at 0.
        axes.set_xscale("symlog", linthresh=min(point["tokens"] for point in attack["curve"] if point["tokens"]))
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


def bars(counts: Sequence[int], x_label: str, y_label: str) -> Any:
    """One bar for each layer."""
    figure, (axes,) = _panels(1, 1)
    _label(axes, x_label, y_label)
    axes.bar(range(len(counts)), counts, color=SERIES["edited"])
    return figure


def strengths(points: Sequence[dict[str, Any]], splits: Sequence[str]) -> Any:
    """What the target prefers at each strength of the contrast that was chosen."""
    figure, (axes,) = _panels(1, 1)
    _label(axes, "strength of the contrast", "accuracy of the target")
    chosen = next((point for point in points if point["chosen"]), points[0])
    line = [point for point in points if point["contrast"] == chosen["contrast"]]
    for split, subject in zip(splits, ("edited", "base", "never"), strict=False):
        values = [point["accuracy"][split] for point in line]
        axes.plot([p["strength"] for p in line], values, color=SERIES[subject], marker="o", markersize=3, label=split)
    axes.axvline(chosen["strength"], color=FAINT, linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    _finish(axes)
    return figure


def svg(figure: Any, label: str) -> Markup:
    """A figure for a page: text stays text, ink and series follow the page's colours."""
    import matplotlib

    drawn = io.BytesIO()
    salt = hashlib.sha256(label.encode()).hexdigest()[:12]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for subject, colour in SERIES.items():
        text = text.replace(colour, f"var(--{subject})")
    text = text.replace(INK, "currentColor")
    # Only groups are named alike in every figure; nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(label)}" ', 1))


def png(figure: Any) -> bytes:
    """A figure for a card, on white; the same figure gives the same bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    return drawn.getvalue()


def whiskers(row: Row) -> list[dict[str, Any]]:
    """Where each model's value and interval lie between a row's ends, in percent."""
    items: list[tuple[str, Measurement]] = [
        (subject, item) for subject, item in (("base", row.base), ("edited", row.edited), ("never", row.never)) if item
    ]
    low = min(0.0, *(item.ci95[0] for _, item in items))
    high = max(item.ci95[1] for _, item in items)
    high = 1.0 if low == 0 and high <= 1 else high
    width = (high - low) or 1.0
    return [
        {"subject": subject, **{key: round(100 * (value - low) / width, 2) for key, value in
         (("at", item.value), ("low", item.ci95[0]), ("high", item.ci95[1]))}}
        for subject, item in items
    ]  # fmt: skip


def _panels(rows: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
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


def _finish(axes: Any) -> None:
    """Accuracies on one scale, so that panels compare at a glance."""
    axes.set_ylim(-0.03, 1.03)
    axes.legend(fontsize=7, loc="best", frameon=False, labelcolor=INK)
