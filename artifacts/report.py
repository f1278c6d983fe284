"""The local report: one HTML file that opens offline and treats model text as data."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from .findings import findings, limits
from .results import Row, format_difference, format_value, layers_probed, read_measurements, table

MAX_TEXT = 4000
"""Characters of one prompt or reply that the report shows; the rest is counted."""

_MAPS = (
    (
        "bypass",
        "Bypass",
        "How strongly the concept shows on its own items while the direction is ablated; lower is better.",
        -1,
    ),
    ("induce", "Induce", "How strongly it shows on neutral items while the direction is added; higher is better.", 1),
    ("kl", "KL", "How far ablation moves neutral text; lower is better.", -1),
)


def write_report(path: Path, results: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """Write the report of a run."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"), undefined=StrictUndefined, autoescape=True
    )
    rows = table(read_measurements(results))
    direction = results.get("direction")
    candidates = direction["candidates"] if direction else []
    text = environment.get_template("report.html.j2").render(
        title=f"{results['concept']['name']} {results['edited']['how']} in {results['base']['name']}",
        results=results, changes=changes, rows=rows, findings=findings(results), limits=limits(results),
        has_never=any(row.never for row in rows), value=format_value, difference=format_difference, tone=_tone,
        positions=sorted({candidate["position"] for candidate in candidates}),
        maps=[_map(direction, *spec) for spec in _MAPS] if direction else [],
        layers=layers_probed(read_measurements(results)),
        splits=sorted({sample["split"] for sample in results["samples"]}),
        settings=yaml.safe_dump(results["run"]["settings"], sort_keys=False), clean=clean,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def _tone(row: Row) -> str:
    """Colour a difference only where its interval leaves out 0 and one direction is better."""
    if row.edited is None or row.edited.difference is None:
        return ""
    low, high = row.edited.difference["ci95"]
    if low <= 0 <= high:
        return ""
    if row.better == "base":
        return "worse"
    return "better" if (high < 0) == (row.better == "lower") else "worse"


def _map(direction: dict[str, Any], key: str, title: str, about: str, sign: int) -> dict[str, Any]:
    """One heat map: a row a point, a cell a position."""
    candidates: Sequence[dict[str, Any]] = direction["candidates"]
    values = [candidate[key] for candidate in candidates if candidate[key] is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    rows: dict[int, list[dict[str, Any]]] = {}
    for candidate in sorted(candidates, key=lambda c: (c["point"], c["position"])):
        value = candidate[key]
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        rows.setdefault(candidate["point"], []).append(
            {
                "text": "–" if value is None else f"{value:.3g}",
                "colour": "" if value is None else _colour(share if sign > 0 else 1 - share),
                "chosen": (candidate["point"], candidate["position"]) == (direction["point"], direction["position"]),
                "note": candidate["rejected"] or "passes the filters",
            }
        )
    units = "nats a token" if key == "kl" else direction["probe"]["units"]
    return {"title": title, "about": about, "units": units, "rows": [{"point": p, "cells": c} for p, c in rows.items()]}


def _colour(share: float) -> str:
    """From pale to teal; dark text stays readable on all of it."""
    pale, strong = (243, 240, 230), (86, 178, 158)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(pale, strong, strict=True))


def clean(text: str) -> str:
    """Make control and bidirectional characters visible, and cut what no one would read."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "�", text)
    return shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}… ({len(shown) - MAX_TEXT} more characters)"
