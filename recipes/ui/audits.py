"""Pages that start an audit and show its curves while it runs."""

import html
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...artifacts.event_log import read_events
from ...artifacts.reporting.audit_page import headline_of
from ...artifacts.reporting.charts import SERIES
from ...artifacts.runs import Run
from ...artifacts.upgrade import read_json
from ..audit.parts import events_of_parts
from ..common.run_folder import WORK
from .frame import Audit, Workbench, base_of, frame, known, say

EVERY = 1.0
"""Seconds between two looks at a running audit."""


def audit_page(bench: Workbench, run: Run) -> None:
    from nicegui import ui

    with frame(f"Audit: {run.name}"):
        concept = run.content.get("concept", {})
        what = "knowledge" if concept.get("kind") == "knowledge" else "behaviour"
        say(
            f"Attack this model, its base and a floor that never had it, to see whether the {what} can be recovered. The"
            " audit runs on this machine."
        )
        base = ui.input("Base model", value=base_of(run)).props("outlined dense").classes("w-96")
        pack = ui.input("Concept pack", value=concept.get("ref", "")).props("outlined dense").classes("w-96")
        reference = ui.input("Reference model that never learned it (optional)").props("outlined dense").classes("w-96")
        budget = (
            ui.select(["quick", "standard", "long"], value="quick", label="Budget")
            .props("outlined dense")
            .classes("w-48")
        )
        attacks = (
            ui.input("Attacks, separated by commas (empty: those of the budget)")
            .props("outlined dense")
            .classes("w-96")
        )
        start = ui.button("Start").props("no-caps")

        def begin() -> None:
            start.disable()
            name = _free(bench)
            words = [
                "audit",
                str(run.folder),
                "--base",
                base.value,
                "--concept",
                pack.value,
                "--budget",
                budget.value,
                "--out",
                str(bench.folder / name),
                "--device",
                bench.device,
                "--dtype",
                bench.dtype,
                *(["--reference", reference.value] if reference.value else []),
                *(["--attacks", attacks.value] if attacks.value else []),
            ]
            # A file, because a pipe that nobody reads would fill up and block the audit.
            errors = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the page
            # A process of its own, so that the page stays answerable, and an audit can be ended.
            command = [sys.executable, "-m", "excise.cli", *words]
            bench.audits[name] = Audit(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors), errors)
            ui.navigate.to(f"/watch/{quote(name)}")

        start.on_click(begin)


def _free(bench: Workbench) -> str:
    number = 1
    while (bench.folder / f"audit-{number}").exists() or f"audit-{number}" in bench.audits:
        number += 1
    return f"audit-{number}"


def watch_page(bench: Workbench, name: str) -> None:
    from nicegui import ui

    if name not in bench.audits and not known(bench, name):
        return
    folder = bench.folder / name
    with frame(f"Audit {name}"):
        told = ui.label("Starting…").props('role="status"')
        result = ui.element("div").classes("w-full")
        charts = ui.element("div").classes("grid grid-cols-1 md:grid-cols-2 gap-4 w-full")
        drawn: dict[str, Any] = {}

        def look() -> None:
            events = _events(folder)
            for attack, series in recovery(events).items():
                if attack not in drawn:
                    with charts, ui.element("figure"):
                        with ui.element("figcaption"):
                            ui.label(attack.replace("_", " "))
                        drawn[attack] = (
                            ui.echart(_chart(), renderer="svg")
                            .classes("h-64")
                            .props(f'role="img" aria-label="Recovery under {html.escape(attack)}"')
                        )
                drawn[attack].options["series"] = [
                    {"type": "line", "name": subject, "data": points, "color": SERIES[subject]}
                    for subject, points in series.items()
                ]
                drawn[attack].update()
            audit = bench.audits.get(name)
            if (folder / "audit.json").is_file():
                timer.deactivate()
                _verdict(result, name, folder)
                told.set_text("Finished.")
            elif audit is not None and audit.process.poll() is not None:
                timer.deactivate()
                audit.errors.seek(0)
                lines = audit.errors.read().decode(errors="replace").strip().splitlines()
                told.set_text(lines[-1] if lines else "The audit stopped without a message; start it again.")
            elif events:
                told.set_text(f"{events[-1]['stage']}: {events[-1]['step']}")

        timer = ui.timer(EVERY, look)


def _verdict(place: Any, name: str, folder: Path) -> None:
    from nicegui import ui

    results = read_json(folder / "audit.json")
    with place:
        with ui.element("h2").classes("text-xl font-bold"):
            ui.label(headline_of(results))
        with ui.element("ul").classes("list-disc pl-6"):
            for reason in results["reasons"]:
                with ui.element("li"):
                    say(reason)
        ui.link("Report", f"/report/{quote(name)}")


def recovery(events: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Measurements of a running audit so far: by attack and model, a list of ``(step, best accuracy)``."""
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for event in events:
        kind, _, rest = event["stage"].partition(" ")
        if kind != "attack" or "at" not in event["metrics"]:
            continue
        subject = rest.split(":")[0]
        step = event["metrics"]["at"]
        for attack, value in event["metrics"].items():
            if attack != "at" and subject in SERIES:
                points = curves.setdefault(attack, {}).setdefault(subject, {})
                points[step] = max(value, points.get(step, 0.0))
    return {
        attack: {subject: sorted(points.items()) for subject, points in subjects.items()}
        for attack, subjects in curves.items()
    }


def _events(folder: Path) -> list[dict[str, Any]]:
    """What an audit told so far; processes that share it tell each in a file of its own, until it ends."""
    files = [folder / "events.jsonl", *events_of_parts(folder / WORK)]
    # A file may go between the look and the reading: the audit has ended.
    events = [event for path in files if path.is_file() for event in read_events(path)]
    return sorted(events, key=lambda event: event.get("time", 0.0))


def _chart() -> dict[str, Any]:
    return {
        "animation": False,
        "tooltip": {"trigger": "axis"},
        "legend": {"bottom": 0},
        "grid": {"left": 45, "right": 15, "top": 15, "bottom": 60},
        "xAxis": {"type": "value", "name": "steps", "nameLocation": "middle", "nameGap": 25},
        "yAxis": {"type": "value", "min": 0, "max": 1},
        "series": [],
    }
