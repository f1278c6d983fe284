"""The page of a search: every trial as a point, the front, and what was varied; one file that opens offline."""

import math
from collections.abc import Sequence
from typing import Any

from ...artifacts.files.written import write_whole
from ...artifacts.reporting.pages import render
from .request import Request
from .results import table
from .study import Done

PAGE = "search.html"
WIDTH, HEIGHT, EDGE = 560, 340, 46


def write_page(request: Request, done: Sequence[Done], front: Sequence[Done]) -> None:
    """Write the page anew."""
    header, rows = table(request, front)
    text = render(
        "search.html.j2",
        recipe=request.recipe,
        base=request.job.source.name,
        concept=request.job.concept.ref,
        states=[(state, sum(one.state == state for one in done)) for state in ("complete", "pruned", "failed")],
        trials=request.trials,
        objectives=[one.name for one in request.rules.objectives],
        guards=[one.name for one in request.rules.guards],
        space=[(name, one.in_words()) for name, one in request.space.items()],
        header=header,
        rows=rows,
        tokens=sum(one.generated_tokens for one in done),
        chart=_chart(request, done, front),
        failures=[(one.number, one.error) for one in done if one.state == "failed"][-10:],
    )
    write_whole(request.folder / PAGE, text)


def _chart(request: Request, done: Sequence[Done], front: Sequence[Done]) -> dict[str, Any] | None:
    """Points of the first two objectives in the page's coordinates; None where there are fewer."""
    complete = [one for one in done if one.state == "complete"]
    if len(request.rules.objectives) < 2 or not complete:
        return None
    axes = []
    for place in (0, 1):
        values = [one.values[place] for one in complete]
        low, high = min(values), max(values)
        # Divergences lie over orders of magnitude.
        log = low > 0 and high > 50 * low
        axes.append((math.log(low) if log else low, math.log(high) if log else high, log))

    def at(one: Done, place: int) -> float:
        low, high, log = axes[place]
        value = math.log(one.values[place]) if log else one.values[place]
        share = (value - low) / (high - low) if high > low else 0.5
        return EDGE + share * (WIDTH - 2 * EDGE) if place == 0 else HEIGHT - EDGE - share * (HEIGHT - 2 * EDGE)

    best = {one.number for one in front}
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "edge": EDGE,
        "points": [
            {
                "x": round(at(one, 0), 1),
                "y": round(at(one, 1), 1),
                "kind": "best" if one.number in best else "broken" if not one.feasible else "other",
                "name": f"trial {one.number}: " + ", ".join(f"{value:.4g}" for value in one.values),
            }
            for one in complete
        ],
        "names": [one.name for one in request.rules.objectives[:2]],
        "ends": [[f"{math.exp(end) if log else end:.3g}" for end in (low, high)] for low, high, log in axes],
        "log": [log for *_, log in axes],
    }
