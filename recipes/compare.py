"""Runs side by side: one table, and what each gave up for what it removed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts.checkpoints.manifest import check_unchanged
from ..artifacts.checkpoints.staging import staged_folder
from ..artifacts.event_log import read_events
from ..artifacts.reporting import charts
from ..artifacts.reporting.results import RESULTS, format_value, read_measurements
from ..artifacts.upgrade import ConceptRecord, ModelRecord, Results, RunRecord, read_json
from ..editing.errors import RequestError
from ..eval.measurements import columns
from ..eval.statistics import Measurement


class _Pack(ConceptRecord):
    sha256: dict[str, str]


class _Compared(Results):
    """What a table of runs needs of each."""

    base: ModelRecord
    concept: _Pack
    run: RunRecord


COLUMNS: dict[str, tuple[str, str]] = columns()
"""What the table shows, where runs have it: rows of the table of measurements that have a heading."""
FORGOTTEN, KEPT = "forget V", ("neighbour", "retain")


@dataclass(frozen=True)
class Line:
    """One model of the table."""

    name: str
    recipe: str
    values: dict[str, Measurement]
    seconds: float | None
    """Of training and of what it needed, from the run's own events; None where they are gone."""

    def kept(self) -> float | None:
        """Mean accuracy on what should stay."""
        values = [self.values[name].value for name in KEPT if name in self.values]
        return sum(values) / len(values) if values else None

    def kept_ci95(self) -> tuple[float, float]:
        """Interval of that mean, from those of its parts (MOVER, Zou and Donner 2008); the parts are other
        questions."""
        parts = [self.values[name] for name in KEPT if name in self.values]
        mean = sum(item.value for item in parts) / len(parts)
        # Shares always have an interval.
        intervals = [item.ci95 or (item.value, item.value) for item in parts]
        below, above = (
            math.hypot(*(each[end] - item.value for each, item in zip(intervals, parts, strict=True))) / len(parts)
            for end in (0, 1)
        )
        return mean - below, mean + above


def compare(runs: list[Path], out: Path) -> list[Line]:
    """Read finished runs of one concept; write ``compare.md``, ``compare.json`` and ``compare.png`` into ``out``.

    Raises:
        RequestError: A folder holds no finished run, or runs are of different concepts.
    """
    lines, _ = table_of(runs)
    with staged_folder(out) as staging:
        (staging / "compare.md").write_text(as_markdown(lines), encoding="utf-8")
        (staging / "compare.json").write_text(json.dumps(_as_json(lines), indent=2) + "\n", encoding="utf-8")
        (staging / "compare.png").write_bytes(_plot(lines))
    return lines


def table_of(runs: list[Path]) -> tuple[list[Line], list[str]]:
    """The lines of finished runs on one concept, after those of their base, and the columns that any of them has.

    Raises:
        RequestError: A folder holds no finished run, or runs are of different concepts.
    """
    contents = [(run, *_read(run)) for run in runs]
    concepts = {json.dumps(content["concept"]["sha256"], sort_keys=True) for _, content, _ in contents}
    if len(concepts) > 1:
        names = ", ".join(sorted({content["concept"]["ref"] for _, content, _ in contents}))
        raise RequestError(f"the runs are of different concepts or versions of one ({names}); compare runs of one pack")
    lines = _subjects(contents[0][1])
    for run, content, seconds in contents:
        lines.append(Line(run.name, _recipe(content), _values(content, "edited"), seconds))
    return lines, [name for name in COLUMNS if any(name in line.values for line in lines)]


def as_markdown(lines: list[Line]) -> str:
    """The table, with intervals and n."""
    shown = [name for name in COLUMNS if any(name in line.values for line in lines)]
    counts = {name: max(line.values[name].n for line in lines if name in line.values) for name in shown}
    head = ["model", "recipe", *(f"{name} (n = {counts[name]})" for name in shown), "seconds to learn"]
    rows = [
        [
            line.name,
            line.recipe,
            *(format_value(line.values.get(name)) for name in shown),
            "" if line.seconds is None else f"{line.seconds:.0f}",
        ]
        for line in lines
    ]
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])


def pareto(lines: list[Line]) -> list[Line]:
    """Lines that no other beats both in forgetting and in keeping."""
    points = [(line.values[FORGOTTEN].value, line.kept(), line) for line in lines if FORGOTTEN in line.values]
    return [
        line
        for forgotten, retention, line in points
        if retention is not None
        and not any(
            # Lines that are equal in both do not beat each other.
            f <= forgotten and k is not None and k >= retention and (f, k) != (forgotten, retention)
            for f, k, _ in points
        )
    ]


def _read(run: Path) -> tuple[dict[str, Any], float | None]:
    for place in (run / "checkpoint", run):
        if (place / RESULTS).is_file():
            check_unchanged(place, [RESULTS])
            return read_json(place / RESULTS, _Compared), _seconds(run / "events.jsonl")
    raise RequestError(f"{run} holds no finished run; give folders that `excise run` wrote")


def _seconds(events: Path) -> float | None:
    """Time of the stages that learned the edit: neither loading nor measuring."""
    if not events.is_file():
        return None
    learning = [
        event["metrics"].get("seconds")
        for event in read_events(events)
        if not event["stage"].startswith(("load", "measure", "export", "induce"))
    ]
    return sum(seconds for seconds in learning if isinstance(seconds, int | float) and seconds >= 0)


def _subjects(content: dict[str, Any]) -> list[Line]:
    """The base, and a model that never knew the concept, where the first run has one."""
    lines = [Line(content["base"]["name"], "base", _values(content, "base"), None)]
    reference = _values(content, "reference")
    return lines + ([Line(content["reference"]["name"], "reference", reference, None)] if reference else [])


def _recipe(content: dict[str, Any]) -> str:
    preset = content["run"]["settings"].get("preset", "default")
    return str(content["run"]["recipe"]) + ("" if preset == "default" else f", {preset}")


def _values(content: dict[str, Any], subject: str) -> dict[str, Measurement]:
    measured = {(item.name, item.split): item for item in read_measurements(content) if item.subject == subject}
    return {name: measured[key] for name, key in COLUMNS.items() if key in measured}


def _as_json(lines: list[Line]) -> list[dict[str, Any]]:
    front = pareto(lines)
    return [
        {
            "name": line.name,
            "recipe": line.recipe,
            "seconds": line.seconds,
            "pareto": line in front,
            "values": {
                name: {"value": item.value, "ci95": item.ci95 and list(item.ci95), "n": item.n}
                for name, item in line.values.items()
            },
        }
        for line in lines
    ]


def _plot(lines: list[Line]) -> bytes:
    front = pareto(lines)
    points = []
    for line in lines:
        retention = line.kept()
        if FORGOTTEN in line.values and retention is not None:
            forgotten = line.values[FORGOTTEN]
            name = f"{line.name} ({line.recipe})"
            points.append(
                (
                    name,
                    line in front,
                    (forgotten.value, *(forgotten.ci95 or (forgotten.value,) * 2)),
                    (retention, *line.kept_ci95()),
                )
            )
    return charts.png(
        charts.trade_off(
            points,
            "multiple choice on what to forget, group V (lower is better)",
            "multiple choice on neighbours and the rest, mean (higher is better)",
            "Forgetting against keeping; circles are on the Pareto front",
        )
    )
