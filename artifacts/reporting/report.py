"""The local report: one HTML file that opens offline and treats model text as data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ...editing.errors import RequestError
from ...eval.measurements import label_of
from ...eval.statistics import Measurement
from ..checkpoints.manifest import read_manifest, verify_folder
from ..files.written import write_whole
from ..upgrade import read_json
from . import charts
from .audit_page import AUDIT, headline_of, shown
from .findings import declining, findings, limits
from .pages import render
from .results import (
    INTERVALS,
    RESULTS,
    Row,
    format_difference,
    format_value,
    layers_probed,
    measured_on,
    read_measurements,
    split_meanings,
    table,
)
from .sections import read_story


def write_report(
    path: Path, results: dict[str, Any], changes: list[dict[str, Any]], audit: dict[str, Any] | None = None
) -> None:
    """Write the report of a run.

    Args:
        results: The run's ``eval.json``.
        changes: What the export said of each tensor.
        audit: An ``audit.json`` of the same checkpoint.
    """
    measurements = read_measurements(results)
    rows, story = table(measurements), read_story(results)
    text = render(
        "report.html.j2",
        title=f"{results['concept']['name']} {results['edited']['how']} in {results['base']['name']}",
        results=results,
        changes=[change for change in changes if change["changed"]],
        rows=rows,
        story=story,
        sections=[section for section in story.sections if "report" in section.where],
        findings=findings(results),
        limits=limits(results, audited=audit is not None),
        declining=declining(results),
        has_reference=any(row.reference for row in rows),
        value=format_value,
        difference=format_difference,
        intervals=INTERVALS,
        tone=_tone,
        whiskers=charts.whiskers,
        # Only projections say what a tensor wrote along the direction.
        projected=any(change.get("written") for change in changes),
        draw=charts.draw,
        grid=_grid,
        label_of=label_of,
        split_meanings=split_meanings(rows),
        measured_on=measured_on(results["concept"]),
        made=results["concept"].get("made", []),
        layers=layers_probed(measurements),
        layer_chart=_layer_chart(measurements),
        splits=sorted({sample["split"] for sample in results["samples"]}),
        settings=yaml.safe_dump(results["run"]["settings"], sort_keys=False),
        audit=audit,
        **({"headline": headline_of(audit), **shown(audit)} if audit else {}),
    )
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


def _layer_chart(measurements: Sequence[Measurement]) -> Markup | None:
    """Probes by layer, where there are any."""
    layers = layers_probed(measurements)
    lines = {
        subject: [
            (row["layer"], row[subject].value, *(row[subject].ci95 or (row[subject].value,) * 2))
            for row in layers
            if subject in row
        ]
        for subject in ("base", "edited", "reference")
    }
    if not layers:
        return None
    drawn = charts.by_layer({name: points for name, points in lines.items() if points}, "accuracy of the probe")
    return charts.svg(drawn, "Accuracy of linear probes by layer")


def _tone(row: Row) -> str:
    """Colour a difference only where it is told from 0 and one direction is better."""
    if not row.moved or row.edited is None or row.edited.difference is None:
        return ""
    if row.better == "base":
        return "worse"
    return "better" if (row.edited.difference["value"] < 0) == (row.better == "lower") else "worse"


def _grid(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a heat map, with a colour for each value."""
    values = [value for row in data["values"] for value in row if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    chosen = data["chosen"] and tuple(data["chosen"])

    def cell(place: tuple[int, int], value: float | None, note: str) -> dict[str, Any]:
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        return {
            "text": "–" if value is None else f"{value:.3g}",
            "colour": "" if value is None else _colour(share if data["higher_is_better"] else 1 - share),
            "chosen": place == chosen,
            "note": note,
        }

    return [
        {
            "name": name,
            "cells": [
                cell((place, column), value, note) for column, (value, note) in enumerate(zip(row, notes, strict=True))
            ],
        }
        for place, (name, row, notes) in enumerate(zip(data["rows"], data["values"], data["notes"], strict=True))
    ]


def _colour(share: float) -> str:
    """From pale to teal; dark text stays readable on all of it."""
    pale, strong = (243, 240, 230), (86, 178, 158)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(pale, strong, strict=True))
