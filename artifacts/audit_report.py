"""An audit as a page that opens offline, and as a section of a card; both say what ``audit.json`` says."""

import io
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .card import CARD
from .manifest import FOLDER, amend_folder

AUDIT = f"{FOLDER}/audit.json"
SECTION = "## Does it hold?"
COLOURS = {"base": "#2456a6", "suppressed": "#b07a00", "edited": "#a3312a", "never": "#0a6b4f"}
HEADLINES = {
    "comes_back": "It comes back",
    "resists": "It resists, but more is left than in a model that never knew",
    "like_never_learned": "Like a model that never learned it",
    "inconclusive": "Inconclusive",
}


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write the audit's own page."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"), undefined=StrictUndefined, autoescape=True
    )
    curves = [attack for attack in results["attacks"] if len(attack["curve"]) > 1]
    text = environment.get_template("audit.html.j2").render(
        results=results, headline=HEADLINES[results["verdict"]], figure=_figure,
        curves=curves, plain=[attack for attack in results["attacks"] if len(attack["curve"]) == 1], best=best,
        estimate=estimate, tokens=tokens,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def card_section(results: dict[str, Any]) -> str:
    """The audit as a card's section, in Markdown."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"), undefined=StrictUndefined, autoescape=False, trim_blocks=True
    )
    return environment.get_template("audit.md.j2").render(
        results=results, headline=HEADLINES[results["verdict"]], best=best,
        estimate=estimate, tokens=tokens,
    )  # fmt: skip


def amend_card(folder: Path, results: dict[str, Any]) -> None:
    """Put the audit into a published checkpoint: its figures, and a section of its card in place of an older one."""
    card = (folder / CARD).read_text(encoding="utf-8")
    section = card_section(results)
    before, _, after = card.partition(SECTION)
    if after:
        # The older section ends where the next one begins.
        _, mark, rest = after.partition("\n## ")
        after = mark.lstrip("\n") + rest
    else:
        before, mark, rest = card.partition("## Samples\n")
        after = mark + rest
    amend_folder(folder, {CARD: f"{before}{section}\n{after}", AUDIT: json.dumps(results, indent=1) + "\n"})


def estimate(found: dict[str, Any] | None) -> str:
    """A value with its interval; an open end is censored."""
    if found is None or found["value"] is None:
        return "—"
    low, high = ("…" if end is None else f"{end:.2f}" for end in found["ci95"])
    return f"{found['bound']}{found['value']:.2f} [{low}, {high}]"


def best(attack: dict[str, Any], subject: str) -> str:
    """The highest accuracy of a subject under an attack."""
    values = [point[subject] for point in attack["curve"] if subject in point]
    return f"{max(values):.3f}" if values else ""


def tokens(attack: dict[str, Any], key: str) -> str:
    """Tokens to a mark, or more than were given."""
    return f"{attack[key]:,.0f}" if attack[key] is not None else f"> {attack['censored_at']:,}"


def _figure(attack: dict[str, Any], chance: float) -> str:
    """A recovery curve as SVG, without any text of a model in it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for subject, colour in COLOURS.items():
        points = [(p["tokens"] + 1, p[subject]) for p in attack["curve"] if subject in p]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=subject)
    axes.axhline(chance, color="#888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens seen by the attacker")
    axes.set_ylabel("right on group V")
    axes.legend(fontsize=7, loc="best")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue().decode()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
