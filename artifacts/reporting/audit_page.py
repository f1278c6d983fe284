"""An audit as a page that opens offline, and as a section of a card; both say what ``audit.json`` says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...eval.audit.formats import OUTCOMES
from ..checkpoints.manifest import FOLDER, amend_folder
from ..files.written import write_whole
from . import charts
from .card import CARD
from .findings import UNTESTED
from .pages import render

AUDIT = f"{FOLDER}/audit.json"
PICTURE = "recovery.png"
SECTION = "## Does it hold?"
UNTESTED_BEFORE = "; relearning, quantization and adversarial prompts were not tested"
"""How cards of version 1 said so."""
HEADLINES = {
    "recovers": "The knowledge recovers",
    "partially_robust": "Partially robust: recovery is not shown, and neither is absence",
    "indistinguishable_from_never_trained": "Indistinguishable from a model that was never trained on it",
    "broken_not_erased": "Broken, not erased",
    "inconclusive": "Inconclusive",
}
OF_BEHAVIOUR = {
    **HEADLINES,
    "recovers": "The behaviour recovers",
    "holds": "It holds: the behaviour comes back only under attacks that give it to the floor too",
}
"""Of an audit of a behaviour."""
OUTCOMES_OF_BEHAVIOUR = {
    **OUTCOMES,
    "recovers": "the behaviour recovers",
    "told_apart": "shown more often than by the floor",
    "not_answered": "the base does not surely show it, so it says nothing",
}


def is_behaviour(results: dict[str, Any]) -> bool:
    """Whether a behaviour was audited; knowledge was in all audits of earlier versions."""
    return results.get("kind") == "behaviour"


def headline_of(results: dict[str, Any]) -> str:
    """The verdict as a sentence."""
    verdict = str(results["verdict"])
    return (OF_BEHAVIOUR if is_behaviour(results) else HEADLINES).get(verdict, verdict)


def outcomes_of(results: dict[str, Any]) -> dict[Any, str]:
    """What the outcomes of formats mean."""
    return OUTCOMES_OF_BEHAVIOUR if is_behaviour(results) else dict(OUTCOMES)


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Write the audit's own page."""
    text = render("audit.html.j2", results=results, headline=headline_of(results), **shown(results))
    write_whole(path, text)


def shown(results: dict[str, Any]) -> dict[str, Any]:
    """What a page needs to show an audit's curves and tables."""

    def figure(attack: dict[str, Any]) -> Any:
        return charts.svg(
            charts.recovery([attack], attack.get("chance", results["controls"]["chance"]), _axis(results)),
            f"Recovery under {attack['name']}",
        )

    return {
        "figure": figure,
        "best": best,
        "estimate": estimate,
        "ends": ends,
        "tokens": tokens,
        "working": working,
        "gain": gain,
        "outcomes": outcomes_of(results),
    }


def _axis(results: dict[str, Any]) -> str:
    return "shows the behaviour" if is_behaviour(results) else "right on group V"


def card_section(results: dict[str, Any], picture: str | None) -> str:
    """The audit as a card's section, in Markdown.

    Args:
        picture: Where the card finds the recovery curves.
    """
    environment = Environment(
        loader=PackageLoader(__package__.rpartition(".")[0], "templates"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
    )
    return environment.get_template("audit.md.j2").render(
        results=results,
        headline=headline_of(results),
        best=best,
        estimate=estimate,
        tokens=tokens,
        working=working,
        gain=gain,
        outcomes=outcomes_of(results),
        picture=picture,
    )


def recovery_picture(results: dict[str, Any]) -> bytes | None:
    """The recovery curves as a PNG file, where any attack trained."""
    trained = [attack for attack in results["attacks"] if len(attack["curve"]) > 1]
    return charts.png(charts.recovery(trained, results["controls"]["chance"], _axis(results))) if trained else None


def write_card(folder: Path, results: dict[str, Any], picture: bytes | None) -> None:
    """Write the section and its picture into an audit's own folder."""
    if picture:
        write_whole(folder / PICTURE, picture)
    write_whole(folder / "card.md", card_section(results, PICTURE if picture else None))


def amend_card(folder: Path, results: dict[str, Any], picture: bytes | None) -> None:
    """Put the audit into a published checkpoint: its figures, and a section of its card in place of an older one."""
    # The card says that these attacks were not tested, and now they were.
    card = (folder / CARD).read_text(encoding="utf-8").replace(f"- {UNTESTED}\n", "").replace(UNTESTED_BEFORE, "")
    section = card_section(results, f"{FOLDER}/{PICTURE}" if picture else None)
    before, _, after = card.partition(SECTION)
    if after:
        # The older section ends where the next one begins.
        _, mark, rest = after.partition("\n## ")
        after = mark.lstrip("\n") + rest
    else:
        before, mark, rest = card.partition("## Samples\n")
        after = mark + rest
    amend_folder(
        folder,
        {
            CARD: f"{before}{section}\n{after}",
            AUDIT: json.dumps(results, indent=1) + "\n",
            **({f"{FOLDER}/{PICTURE}": picture} if picture else {}),
        },
    )


def estimate(figure: dict[str, Any] | None) -> str:
    """A value with its interval; an open end is censored."""
    if figure is None or figure["value"] is None:
        return "—"
    return f"{figure['bound']}{figure['value']:.2f} {ends(figure['ci95'])}"


def ends(interval: Sequence[float | None]) -> str:
    """Both ends of an interval; an open one is an ellipsis."""
    return f"[{', '.join('…' if end is None else f'{end:.2f}' for end in interval)}]"


def best(attack: dict[str, Any], subject: str) -> str:
    """The highest accuracy of a subject under an attack."""
    values = [point[subject] for point in attack["curve"] if subject in point]
    return f"{max(values):.3f}" if values else ""


def working(attack: dict[str, Any]) -> str:
    """What the edited model answers of everything else where the attack gets furthest; older audits did not ask it."""
    utility = attack.get("utility")
    return "" if utility is None else f"{utility['edited']:.3f}"


def gain(attack: dict[str, Any]) -> str:
    """What the floor itself gains by the attack, marked where that is so much that the attack teaches."""
    value = attack.get("floor_gain")
    if value is None:
        return ""
    bits = (attack.get("bits") or {}).get("reference")
    told = "" if bits is None else f" ({bits:+.2f} bits)"
    return f"{value:+.3f}{told}{' teaches' if attack['teaches'] else ''}"


def tokens(attack: dict[str, Any], key: str) -> str:
    """Tokens to a mark, or more than were given."""
    return f"{attack[key]:,.0f}" if attack[key] is not None else f"> {attack['censored_at']:,}"
