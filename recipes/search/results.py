"""What a search found, as plain data, as a table, and as lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .figures import Objective
from .request import Request
from .study import Done


@dataclass(frozen=True)
class SearchResults:
    """All trials, and those that no other beats."""

    content: dict[str, Any]
    header: list[str]
    rows: list[list[str]]
    """Of the front."""


def results_of(request: Request, done: Sequence[Done], front: Sequence[Done]) -> SearchResults:
    """Plain data and the table of the front."""
    states = {state: sum(one.state == state for one in done) for state in ("complete", "pruned", "failed")}
    content = {
        "out": str(request.folder),
        "recipe": request.recipe,
        "objectives": [one.name for one in request.rules.objectives],
        "guards": [one.name for one in request.rules.guards],
        "trials": states,
        "broke_a_guard": sum(one.state == "complete" and not one.feasible for one in done),
        "generated_tokens": sum(one.generated_tokens for one in done),
        "seconds": round(sum(one.seconds for one in done), 1),
        "front": [_as_json(one, request.rules.objectives) for one in front],
    }
    header, rows = table(request, front)
    return SearchResults(content, header, rows)


def table(request: Request, trials: Sequence[Done]) -> tuple[list[str], list[list[str]]]:
    """Trials with their objectives and what was varied."""
    header = ["trial", *(one.name for one in request.rules.objectives), *request.space]
    return header, [
        [
            str(one.number),
            *(f"{value:.4g}" for value in one.values),
            *(_short(one.params.get(name)) for name in request.space),
        ]
        for one in trials
    ]


def line(done: Sequence[Done], front: Sequence[Done], objectives: Sequence[Objective], trials: int) -> str:
    """The last trial in one line."""
    last = done[-1]
    values = ", ".join(f"{one.figure.name} {value:.4g}" for one, value in zip(objectives, last.values, strict=False))
    best = " (on the front)" if any(one.number == last.number for one in front) else ""
    said = {
        "complete": f"{values}{best}" + ("" if last.feasible else " (breaks a guard)"),
        "pruned": "left early: others are better, or a guard is broken",
        "failed": f"failed: {last.error:.100}",
    }[last.state]
    return f"trial {last.number}, {len(done)} of {trials}: {said}"


def _as_json(one: Done, objectives: Sequence[Objective]) -> dict[str, Any]:
    values = {objective.name: value for objective, value in zip(objectives, one.values, strict=True)}
    return {"trial": one.number, "values": values, "settings": dict(one.settings), "figures": dict(one.figures)}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
