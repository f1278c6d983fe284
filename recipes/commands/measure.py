"""Commands that measure models, and measurements: eval, audit, meta and compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...artifacts.events import Events
from .failures import Interrupted
from .flags import ANY_MODEL, Config, Device, Dtype, Jobs, Json, Out, Resume, Set, Text, Whole, say, say_json, say_plan
from .session import after_audit, carry_out, settle, watcher, words

if TYPE_CHECKING:
    from ..audit.request import AuditJob
    from ..evaluate import EvaluateSettings


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"One or more models, each {ANY_MODEL}.")],
    concept: Text = None,
    base: Text = None,
    suite: Text = None,
    reference: Text = None,
    questions: Whole = None,
    as_shipped: Annotated[bool, typer.Option("--as-shipped")] = False,
    judge: Annotated[list[str] | None, typer.Option()] = None,
    lm_eval: Text = None,
    config: Config = None,
    set_: Set = None,
    device: Text = None,
    dtype: Text = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be measured; load no weights.")] = False,
    as_json: Json = False,
) -> None:
    """Measure one or several models with a concept pack.

    All models get the same items; with --base, each value is compared with the base.
    """
    from ...artifacts.models.outline import outlines
    from ...artifacts.reporting.terminal import terminal_width
    from .. import evaluate as recipe
    from ..common.settings import load_settings
    from . import shown

    flags = {
        "concept": concept,
        "base": base,
        "suite": suite,
        "reference": reference,
        "questions": questions,
        "as_shipped": as_shipped or None,
        "judge": judge or None,
        "lm_eval": words(lm_eval),
        "device": device,
        "dtype": dtype,
    }
    settings = load_settings(recipe.EvaluateSettings, config, set_ or [], flags).completed(models)
    settle()
    if settings.suite:
        return _suite(models, settings, dry_run=dry_run, as_json=as_json)
    with outlines(dry_run):
        job = recipe.prepare(
            models,
            settings.concept,
            settings.base,
            device=settings.device,
            dtype=settings.dtype,
            settings=settings.measuring(),
            judges=settings.judge,
            rubric=settings.rubric,
            judge_key=settings.judge_key,
            benchmarks=settings.lm_eval,
        )
        if dry_run:
            return say_plan(recipe.describe(job), as_json)
    evaluation = recipe.run(job, Events(watcher=watcher()))
    if as_json:
        return say_json(evaluation.as_json())
    say(shown.evaluation_table(evaluation, terminal_width()))


def _suite(models: list[str], settings: EvaluateSettings, *, dry_run: bool, as_json: bool) -> None:
    """Print the table of a benchmark."""
    from ...artifacts.models.outline import outlines
    from ...artifacts.reporting.terminal import terminal_width
    from ..suites import run as recipe

    with outlines(dry_run):
        job = recipe.prepare(
            models,
            settings.concept,
            settings.suite or "auto",
            settings.base,
            settings.reference,
            device=settings.device,
            dtype=settings.dtype,
            settings=settings.measuring(),
        )
        if dry_run:
            return say_plan(recipe.describe(job), as_json)
    table = recipe.run(job, Events(watcher=watcher()))
    if as_json:
        return say_json(table.as_json())
    say(table.text(terminal_width()))


def audit(
    model: Annotated[str, typer.Argument(help=f"Model to audit: {ANY_MODEL}.")],
    concept: Text = None,
    base: Text = None,
    reference: Text = None,
    attacks: Text = None,
    budget: Text = None,
    questions: Whole = None,
    card: Annotated[bool, typer.Option("--card")] = False,
    fresh: Annotated[bool, typer.Option("--fresh")] = False,
    out: Out = None,
    config: Config = None,
    set_: Set = None,
    seed: Whole = None,
    device: Text = None,
    dtype: Text = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be attacked; load no weights.")] = False,
    resume: Resume = False,
    jobs: Jobs = None,
    part: Annotated[
        str | None, typer.Option(hidden=True, help="Do one part of an audit that --jobs has split up.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Red-team an edited model: try to recover what was removed.

    Runs the same attacks on the model, its base and a reference that never had the knowledge or the behaviour, and reports
    a verdict.
    """
    if not dry_run and not part:
        _import_beside(jobs)
    from ...artifacts.reporting.terminal import next_steps, paths, terminal_width
    from ..audit import recipe
    from . import shown

    flags = {
        "model": model,
        "concept": concept,
        "base": base,
        "reference": reference,
        "attacks": words(attacks),
        "budget": budget,
        "questions": questions,
        "card": card or None,
        "fresh": fresh or None,
        "out": out,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    settings, results = carry_out(
        recipe,
        recipe.AuditSettings,
        ["excise", "audit", model],
        config=config,
        assignments=set_ or [],
        flags=flags,
        resume=resume,
        dry_run=dry_run,
        run=_in_parts(jobs, part),
        more=["--jobs", jobs] if jobs else [],
    )
    if dry_run:
        return say_plan(results, as_json)
    if part:
        return
    if as_json:
        return say_json({"out": str(settings.out), **results})
    files = {"audit": "audit.json", "report": "report.html", "card": "card.md"}
    say(shown.audit_end(results, terminal_width()) + "\n")
    say(paths({name: settings.out / file for name, file in files.items()}))
    if commands := after_audit(settings):
        say("\n" + next_steps(commands))


def _import_beside(jobs: str | None) -> None:
    """Where further processes are likely, begin what they are copied from: its imports take as long as this one's."""
    from ..jobs.engines import own_cores
    from ..jobs.fork_server import fork_server

    if own_cores() > 1 and (jobs is None or (jobs.startswith("local:") and jobs != "local:1")):
        fork_server()


def _in_parts(jobs: str | None, part: str | None) -> Callable[[AuditJob, Events, str], Any]:
    """How an audit runs: split up on an engine, as one of the parts, or in as many processes as are fastest."""
    from ..audit import recipe

    if part:
        return lambda job, events, _: recipe.run_part(job, events, part)
    if not jobs:
        return recipe.run_beside
    from ..jobs.engines import Local, parse_engine

    engine = parse_engine(jobs)
    if engine == Local(1):
        return lambda job, events, _: recipe.run(job, events)
    return lambda job, events, again: recipe.run_split(job, events, engine, again)


def meta(
    knows: Annotated[list[str], typer.Option(help=f"A model that has the knowledge, {ANY_MODEL}; two or more.")],
    never: Annotated[list[str], typer.Option(help="A model that never had it; two or more. The first is taught too.")],
    concept: Annotated[str, typer.Option(help="Knowledge pack to measure with: builtin:NAME or a folder.")],
    edited: Annotated[
        list[str] | None, typer.Option(help="An edited model, measured rounded to 4 bits and relearned too.")
    ] = None,
    questions: Annotated[int, typer.Option(min=0, help="Most questions and texts of each split; 0 takes all.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of relearning from group T.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of relearning.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write meta.json into.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Find out which measurements to believe.

    Every measurement is made on models that are known to have the knowledge or not: does it tell them apart? With
    --edited also: does it stay put under rounding to 4 bits, and does relearning move it as in a model that never knew?
    """
    from ...artifacts.checkpoints.staging import refuse_existing
    from ...artifacts.reporting.terminal import paths, terminal_width
    from .. import meta as recipe
    from . import shown

    if out:
        refuse_existing(out)
    settle()
    job = recipe.prepare(
        knows, never, edited or [], concept, questions=questions, steps=steps, seed=seed, device=device, dtype=dtype
    )
    try:
        found = recipe.run(job, Events(watcher=watcher()))
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted; models that were measured are remembered: the same command goes on") from error
    if out:
        recipe.write(found, out)
    if as_json:
        return say_json(found.as_json())
    say(shown.meta_evaluation(found, terminal_width()))
    if out:
        say("\n" + paths({"table": out / "meta.json"}))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs on one concept.")],
    out: Annotated[Path, typer.Option(help="Folder to write compare.md, compare.json and compare.png into.")],
    as_json: Json = False,
) -> None:
    """Put finished runs side by side in one table and one plot."""
    from ...artifacts.checkpoints.staging import refuse_existing
    from ...artifacts.reporting.terminal import paths, terminal_width
    from .. import compare as recipe
    from . import shown

    refuse_existing(out)
    lines = recipe.compare(runs, out)
    if as_json:
        return say((out / "compare.json").read_text(encoding="utf-8").strip())
    say(shown.comparison(lines, terminal_width()) + "\n")
    say(paths({"table": out / "compare.md", "plot": out / "compare.png"}))
