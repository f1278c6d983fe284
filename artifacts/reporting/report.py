"""The local report: one HTML file that opens offline and treats model text as data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...editing.errors import RequestError
from ...eval.statistics import Measurement
from ..checkpoints.manifest import read_manifest, verify_folder
from ..checkpoints.staging import write_whole
from ..upgrade import read_json
from . import charts
from .audit_page import AUDIT, HEADLINES, shown
from .findings import findings, limits
from .pages import render
from .results import RESULTS, Row, format_difference, format_value, layers_probed, read_measurements, table

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


def write_report(
    path: Path, results: dict[str, Any], changes: list[dict[str, Any]], audit: dict[str, Any] | None = None
) -> None:  # fmt: skip
    """Write the report of a run.

    Args:
        results: The run's ``eval.json``.
        changes: What the export said of each tensor.
        audit: An ``audit.json`` of the same checkpoint.
    """
    measurements = read_measurements(results)
    rows = table(measurements)
    direction = results.get("direction")
    candidates = direction["candidates"] if direction else []
    text = render(
        "report.html.j2",
        title=f"{results['concept']['name']} {results['edited']['how']} in {results['base']['name']}",
        results=results, changes=[change for change in changes if change["changed"]], rows=rows, findings=findings(results), limits=limits(results, audited=audit is not None),
        has_reference=any(row.reference for row in rows), value=format_value, difference=format_difference, tone=_tone,
        whiskers=charts.whiskers, figures=_figures(results, measurements), controls=_controls(results),
        positions=sorted({candidate["position"] for candidate in candidates}),
        maps=[_map(direction, *spec) for spec in _MAPS] if direction else [],
        layers=layers_probed(measurements),
        splits=sorted({sample["split"] for sample in results["samples"]}),
        settings=yaml.safe_dump(results["run"]["settings"], sort_keys=False),
        audit=audit, **({"headline": HEADLINES[audit["verdict"]], **shown(audit)} if audit else {}),
    )  # fmt: skip
    write_whole(path, text)


def report_of(folder: Path, path: Path) -> None:
    """Write the report of a published checkpoint from what it says of itself, its audit included.

    Raises:
        RequestError: Nothing was measured on it.
        VerifyError: It is not as it was published.
    """
    verify_folder(folder)
    if not (folder / RESULTS).is_file():
        raise RequestError(f"{folder.name} holds no {RESULTS}; measure it with `excise eval {folder} --concept PACK`")
    results = read_json(folder / RESULTS)
    if "run" not in results:
        raise RequestError(
            f"{folder.name} has measurements but no record of a recipe's run; read them with `excise card {folder}`"
        )
    audit = read_json(folder / AUDIT) if (folder / AUDIT).is_file() else None
    write_report(path, results, (read_manifest(folder) or {})["tensors_changed"], audit)


def _figures(results: dict[str, Any], measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The charts that a run's content allows, by the section they stand in."""
    found = {}
    if layers := layers_probed(measurements):
        lines = {
            subject: [(row["layer"], row[subject].value, *row[subject].ci95) for row in layers if subject in row]
            for subject in ("base", "edited", "reference")
        }
        drawn = charts.by_layer({name: points for name, points in lines.items() if points}, "accuracy of the probe")
        found["layers"] = charts.svg(drawn, "Accuracy of linear probes by layer")
    if check := results.get("target_check"):
        found["check"] = charts.svg(
            charts.strengths(check["curve"], check["splits"]), "What the target prefers at each strength"
        )
    if pruning := results.get("pruning"):
        found["units"] = charts.svg(
            charts.bars(pruning["by_layer"], "layer", "neurons silenced"), "Neurons silenced in each layer"
        )
    return found


def _controls(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, Measurement]]]]:
    """The same recipe with other units or directions: ``(name, [(measurement, split, value)])``."""
    if pruning := results.get("pruning"):
        return [
            (name, [("multiple choice", split, Measurement("multiple_choice", split, "edited", found["value"], "accuracy", "higher", found["n"], 0, tuple(found["ci95"])))
                    for split, found in splits.items()])
            for name, splits in pruning["controls"].items()
        ]  # fmt: skip
    caft = results.get("caft") or {}
    return [
        (name, [(row.label, row.split, row.edited) for row in table([Measurement(**{**item, "ci95": tuple(item["ci95"])}) for item in items]) if row.edited])
        for name, items in caft.get("controls", {}).items()
    ]  # fmt: skip


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
