"""Commands on many runs: sweep and watch."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...editing.errors import ExciseError
from .flags import Jobs, Json, Out, say, say_json, say_plan
from .session import settle


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file with recipe, model, concept, set and seeds.")],
    out: Out = None,
    jobs: Jobs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; start none.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe with every combination of settings, and seeds.

    Each is an ordinary run in OUT. The table has means over seeds with Student's t intervals; OUT/results.json too. The same
    command with the same --out goes on: finished runs are not repeated.
    """
    from ...artifacts.reporting.terminal import paths, terminal_width
    from ..common.run_folder import free_folder
    from ..common.settings import load_settings
    from ..sweep import recipe
    from ..sweep.table import text

    settings = load_settings(recipe.SweepSettings, file, [], {"out": out, "jobs": jobs})
    settle()
    job = recipe.prepare(settings)
    if dry_run:
        return say_json(recipe.describe(job)) if as_json else _say_runs(recipe.describe(job))
    if settings.out is None:
        job = recipe.prepare(settings.model_copy(update={"out": free_folder("sweep")}))
    again = ["excise", "sweep", str(file), "--out", str(job.out), *(["--jobs", jobs] if jobs else [])]
    done = recipe.run(job, shlex.join(again))
    if as_json:
        say_json({"out": str(job.out), **done.as_json()})
    else:
        say(text(done.lines, done.base, terminal_width()) + "\n")
        say(paths({"results": job.out / recipe.RESULTS, "runs": job.out}))
    if done.failed:
        first = done.failed[0]
        raise ExciseError(
            f"{len(done.failed)} of {len(done.outcomes)} runs failed; {first.job.name}: {first.error} (log: {first.log})."
            f" They are tried again by {shlex.join(again)}"
        )


def _say_runs(plan: dict[str, object]) -> None:
    from ...artifacts.reporting.terminal import listed, terminal_width

    runs = plan.pop("runs")
    assert isinstance(runs, list)
    say_plan({**plan, "runs": len(runs)}, as_json=False)
    say(listed(["run", "command"], [[run["name"], shlex.join(run["command"])] for run in runs], terminal_width()))


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run, an audit, a sweep, or of several of these.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print each change as one line of JSON.")] = False,
) -> None:
    """Follow runs from another terminal or host until all have ended.

    It reads files alone, so Ctrl-C ends the watching and leaves the runs as they are.
    """
    from ..jobs.board import board, counts
    from ..jobs.watch import watch as follow
    from ..jobs.watch import watch_as_json

    try:
        if as_json:
            watch_as_json(run, say)
            return
        rows = follow(run, board(sys.stdout, stages=True))
    except KeyboardInterrupt as error:
        raise _Left(f"no longer watching {run}; its runs go on") from error
    if sys.stdout.isatty() and len(rows) > 1:
        return
    say(f"{run}: {counts(rows)}")


class _Left(ExciseError):
    exit_code = 130
