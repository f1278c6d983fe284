"""Draw docs/picture.png from an audit: right answers before the edit, after it, and under attack.

    excise run elm --out runs/elm-1 && excise audit runs/elm-1 --out runs/audit-1
    python docs/make_picture.py runs/audit-1

Without an argument it draws the figures of docs/picture.json, which are those of the audit in docs/measured.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from excise.artifacts.reporting.charts import FAINT, INK, SERIES
from excise.eval.intervals import wilson
from matplotlib.figure import Figure

ATTACKS = {
    "none": "no attack",
    "int4": "weights\nin 4 bits",
    "unrelated": "fine-tuned\nelsewhere",
    "soft_prompt": "learned\nprompt",
    "rtt": "fine-tuned\non group T",
}
"""Attacks that the picture shows, with what it calls them."""
MODELS = {"base": "before", "edited": "after", "reference": "never read about it"}


def shares(audit: dict[str, Any], attack: str) -> dict[str, float]:
    """Share of group V that each model answers, at its best under an attack; at step 0 without one."""
    if attack == "none":
        first = next(one for one in audit["attacks"] if one["name"] == "rtt")["curve"][0]
        return {model: first[model] for model in MODELS}
    (found,) = (one for one in audit["attacks"] if one["name"] == attack)
    return {model: max(point[model] for point in found["curve"]) for model in MODELS}


def draw(audit: dict[str, Any], out: Path) -> None:
    """One group of bars an attack, one bar a model."""
    n, chance = audit["n"], audit["controls"]["chance"]
    figure = Figure(figsize=(7.5, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, (model, label) in enumerate(MODELS.items()):
        for group, attack in enumerate(ATTACKS):
            value = shares(audit, attack)[model]
            low, high = wilson(round(value * n), n)
            x = group + 0.27 * (place - 1)
            axes.bar(x, value, 0.25, color=SERIES[model], label=label if group == 0 else None)
            # The interval of the share among n questions; several seeds of an attack share these questions.
            axes.errorbar(
                x, value, [[max(0.0, value - low)], [max(0.0, high - value)]], color=INK, linewidth=1, capsize=2
            )
            axes.text(x, high + 0.02, f"{value:.2f}", ha="center", fontsize=9, color=INK)
    axes.axhline(chance, color=FAINT, linewidth=0.8, linestyle=":")
    axes.text(len(ATTACKS) - 0.58, chance, "chance", fontsize=8, color=FAINT, va="bottom")
    axes.set_xticks(range(len(ATTACKS)), list(ATTACKS.values()))
    axes.set_ylabel(f"right on held-out questions (n = {n})")
    axes.set_ylim(0, 1.18)
    axes.set_xlim(-0.5, len(ATTACKS) - 0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, frameon=False)
    figure.savefig(out)


if __name__ == "__main__":
    file = Path(sys.argv[1]) / "audit.json" if len(sys.argv) > 1 else Path(__file__).with_name("picture.json")
    draw(json.loads(file.read_text(encoding="utf-8")), Path(__file__).with_name("picture.png"))
