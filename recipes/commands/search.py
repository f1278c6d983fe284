"""Commands that search a recipe's settings: search and pick."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ...artifacts.events import Events
from ...editing.errors import RequestError
from .. import RECIPES
from .flags import Json, Set, Text, Whole, say, say_json, say_plan
from .session import carry_out, settle, watcher

Storage = Annotated[
    str | None,
    typer.Option(
        help="Database that keeps the trials, as a URL; workers on several machines may share one. Default: a file in --out."
    ),
]


def search(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe; `excise list recipes` shows all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the search. The same command goes on with it.")] = None,
    model: Text = None,
    concept: Text = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; KEY: {search: [LOW, HIGH], log: true} varies one.")
    ] = None,
    set_: Set = None,
    trials: Annotated[int, typer.Option(help="Number of trials to end with, those of earlier calls among them.")] = 50,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="FIGURE:min or FIGURE:max, such as forget:min or kl:min; may be repeated. Default: the recipe's."
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(help="What no trial may cost, such as 'rest>=-0.02' (change from the base); may be repeated."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="Most prompts of each split that a trial replies to.")] = 64,
    storage: Storage = None,
    worker: Annotated[
        Path | None, typer.Option("--worker", metavar="DIR", help="Join the search in this folder as one more worker.")
    ] = None,
    jobs: Annotated[
        str | None,
        typer.Option(help="Search with several workers: local:N on this machine, or slurm:KEY=VALUE,... on a cluster."),
    ] = None,
    workers: Annotated[int, typer.Option(help="With --jobs slurm: number of workers; 0 takes 4.")] = 0,
    budget: Text = None,
    seed: Whole = None,
    device: Text = None,
    dtype: Text = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be searched; load no weights.")] = False,
    as_json: Json = False,
) -> None:
    """Search a recipe's settings by what its edits do.

    Every trial's edit is tried in memory, measured with what is cheap first, and kept as data. Items that choose are
    never the items that are reported: `excise pick` makes a run of a trial, measured on the other half.
    """
    from ..search import request as requests
    from ..search import run as loop

    if worker is not None:
        asked = requests.recorded(worker, storage, trials)
    else:
        if recipe is None:
            raise RequestError(f"give a recipe to search, or --worker DIR; recipes: {', '.join(RECIPES)}")
        flags: dict[str, Any] = {"model": model, "concept": concept, "budget": budget, "seed": seed}
        flags |= {"device": device, "dtype": dtype}
        asked = requests.prepare(
            recipe,
            out or _free_folder(),
            config=config,
            assignments=set_ or [],
            flags=flags,
            objectives=objective or [],
            guards=guard or [],
            storage=storage,
            trials=trials,
            prompts=prompts,
            write=not dry_run,
        )
    if dry_run:
        return say_plan(loop.describe(asked), as_json)
    settle()
    results = _carried_out(asked, loop) if jobs is None or worker else _by_workers(asked, jobs, workers)
    if as_json:
        return say_json(results.content)
    return _show(asked.folder, results)


def pick(
    folder: Annotated[Path, typer.Argument(help="Folder of a search.")],
    trial: Annotated[int, typer.Argument(help="Number of a trial, as the search shows it.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/RECIPE-N, with the first free N.")
    ] = None,
    storage: Storage = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be edited; load no weights.")] = False,
    as_json: Json = False,
) -> None:
    """Make a run of a trial, measured on what the search never asked.

    The run is an ordinary one: its card says that it was chosen, from how many trials, and `excise reproduce` makes it again.
    """
    from ..search.pick import settings_of_trial
    from .edit import show_run

    recipe, settings = settings_of_trial(folder, trial, storage)
    module = importlib.import_module(RECIPES[recipe].module)
    chosen, done = carry_out(
        module,
        getattr(module, RECIPES[recipe].settings),
        ["excise", "run", recipe],
        config=None,
        assignments=[],
        flags=settings | {"out": out},
        resume=False,
        dry_run=dry_run,
    )
    if dry_run:
        return say_plan(done, as_json)
    return show_run(chosen, done, all_rows=False, as_json=as_json)


def _by_workers(asked: Any, jobs: str, count: int) -> Any:
    """Run the search by jobs, which show their own progress."""
    from ..search import workers

    engine, number = workers.prepare(asked, jobs, count)
    return workers.run(asked, engine, number)


def _free_folder() -> Path:
    from ..common.run_folder import free_folder

    return free_folder("search")


def _carried_out(asked: Any, loop: Any) -> Any:
    """Run the search with its front on the terminal, or one line a trial where there is none."""
    from ..search.results import line
    from .failures import Interrupted
    from .live import Live

    live = Live(asked) if sys.stderr.isatty() else None

    def told(done: Any, front: Any) -> None:
        if live:
            return live.show(done, front)
        sys.stderr.write(line(done, front, asked.rules.objectives, asked.trials) + "\n")
        sys.stderr.flush()
        return None

    events = Events(asked.folder / "events.jsonl", watcher())
    try:
        return loop.run(asked, events, told)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; the trials that ended are kept in {asked.folder}. The same command goes on"
        ) from error
    finally:
        if live:
            live.stop()


def _show(folder: Path, results: Any) -> None:
    from ...artifacts.reporting.terminal import aligned, next_steps, paths, terminal_width

    about = results.content
    states = ", ".join(f"{count} {state}" for state, count in about["trials"].items() if count)
    say(f"{states}; {about['generated_tokens']:,} tokens generated\n")
    if results.rows:
        say(aligned(results.header, results.rows, terminal_width()) + "\n")
    else:
        say("No complete trial keeps every guard: loosen a guard, widen the ranges, or allow more trials.\n")
    say(paths({"page": folder / "search.html"}) + "\n")
    if results.rows:
        say(next_steps([f"excise pick {folder} {results.rows[0][0]}"]))
