"""Commands that edit models: run and apply."""

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ...artifacts.events import Events
from ...editing.errors import RequestError, nearest
from .. import RECIPES
from .flags import ANY_MODEL, Config, Json, Number, Out, Resume, Set, Text, Whole, say, say_json, say_plan
from .session import after_run, carry_out, settle, watcher


def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `excise list recipes` shows all.")],
    model: Text = None,
    concept: Text = None,
    out: Out = None,
    config: Config = None,
    set_: Set = None,
    budget: Text = None,
    seed: Whole = None,
    device: Text = None,
    dtype: Text = None,
    kl_budget: Number = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be edited; load no weights.")] = False,
    resume: Resume = False,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Show every measurement at the end, not only the first 12.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Edit a model with a recipe and measure what changed.

    Writes OUT/checkpoint, a model in the format of transformers with its card, and OUT/report.html.
    """
    if recipe not in RECIPES:
        raise RequestError(f"no recipe {recipe!r}{nearest(recipe, list(RECIPES))}; recipes: {', '.join(RECIPES)}")
    # Imported only now, because help and lists must not wait for torch.
    module = importlib.import_module(RECIPES[recipe].module)
    flags: dict[str, Any] = {"model": model, "concept": concept, "out": out, "budget": budget, "seed": seed}
    flags |= {"device": device, "dtype": dtype, "kl_budget": kl_budget}
    settings, done = carry_out(
        module,
        getattr(module, RECIPES[recipe].settings),
        ["excise", "run", recipe],
        config=config,
        assignments=set_ or [],
        flags=flags,
        resume=resume,
        dry_run=dry_run,
    )
    if dry_run:
        return say_plan(done, as_json)
    return show_run(settings, done, all_rows=all_rows, as_json=as_json)


def show_run(settings: Any, done: Any, *, all_rows: bool, as_json: bool) -> None:
    """Print what a finished run did, and what to type next."""
    if as_json:
        return say_json({"out": str(done.out), **done.results})
    from ...artifacts.reporting.terminal import next_steps, paths, terminal_width
    from . import shown

    say(shown.run_end(done.results, terminal_width(), all_rows=all_rows) + "\n")
    say(paths({"checkpoint": done.out / "checkpoint", "report": done.out / "report.html"}) + "\n")
    return say(next_steps(after_run(settings, done.results)))


def apply(
    edit: Annotated[
        Path,
        typer.Argument(
            help="A run's folder, its checkpoint, a folder with edit.json, or a PEFT adapter (folder or Hub id)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    base: Annotated[str | None, typer.Option(help=f"Model to edit: {ANY_MODEL}. An adapter names its own.")] = None,
    kl_budget: Annotated[
        float | None,
        typer.Option(
            help="Choose the strength so that KL(base || edited) on retain texts is at most this, in nats per token. Loads"
            " the whole model."
        ),
    ] = None,
    max_strength: Annotated[
        float, typer.Option(help="With --kl-budget: the strongest that may be chosen; 1 is the edit as it was learned.")
    ] = 1.0,
    concept: Annotated[
        str | None,
        typer.Option(help="With --kl-budget: concept pack of the retain texts. A built-in pack's edit names its own."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be edited; read no weights.")] = False,
    as_json: Json = False,
) -> None:
    """Apply a saved edit or a PEFT adapter to a model of any size.

    The model is read and written piece by piece and never loaded whole, unless --kl-budget asks for it.
    """
    from ...artifacts.models.outline import outlines
    from ...artifacts.reporting.findings import STORED_APART, code_left_out
    from ...artifacts.reporting.terminal import next_steps
    from .. import apply as recipe

    if kl_budget is None and (concept or max_strength != 1):
        raise RequestError("--concept and --max-strength are for --kl-budget; give --kl-budget too, or leave them out")
    events = Events(watcher=watcher())
    # A strength is looked for on the weights themselves.
    with outlines(dry_run and kl_budget is None):
        prepared = recipe.prepare(edit, base, out)
        plan = recipe.describe(prepared) if dry_run else {}
    if kl_budget is not None:
        from .. import apply_budget
        from ..common.kl_budget import Budget

        settle()
        budget = Budget(kl_budget, max_strength)
        pack = apply_budget.prepare(prepared, budget, concept)
        prepared = prepared if dry_run else apply_budget.fitted(prepared, budget, pack, events)
    if dry_run:
        return say_plan(plan, as_json)
    export = recipe.run(prepared, events)
    summary = recipe.summary(export, out) | recipe.strength_of(prepared)
    if as_json:
        return say_json(summary)
    if chosen := summary.get("kl_budget"):
        say(recipe.strength_in_words(chosen))
    worst = summary["largest_residual"]
    left = "" if worst is None else f"; at most {worst:.1e} of the component is left"
    say(f"{summary['tensors_changed']} of {summary['tensors_declared']} declared tensors changed{left}")
    if summary["code_left_out"]:
        say(code_left_out(summary["code_left_out"]))
    if summary["stored_apart"]:
        say(STORED_APART)
    say(f"{out} is complete ({export.bytes_written / 1e9:.2f} GB)\n")
    before = base or prepared.source.address
    say(next_steps([f"excise eval {out} --concept PACK --base {before}", f"excise chat {out}", f"excise verify {out}"]))
