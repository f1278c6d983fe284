"""Commands that look at models and at what excise has: list, architecture, chat, card, report, inspect,
localize, diff and ui."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.events import Events
from ...editing.errors import RequestError, nearest
from .flags import ANY_MODEL, Device, Dtype, Folder, Json, say, say_json
from .session import integers, settle, watcher


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="recipes, measurements, attacks, architectures, concepts or models; or a recipe, audit or eval."
        ),
    ] = "recipes",
    as_json: Json = False,
) -> None:
    """List recipes, attacks, models, ..., or a recipe's settings."""
    from .lists import KINDS, WITH_SETTINGS, settings

    if what not in KINDS and what not in WITH_SETTINGS:
        raise RequestError(
            f"nothing called {what!r} to list{nearest(what, [*KINDS, *WITH_SETTINGS])}; give one of {', '.join(KINDS)},"
            f" or for settings one of {', '.join(WITH_SETTINGS)}"
        )
    header = ("name", "about") if what in KINDS else ("setting", "default", "about")
    lines = KINDS[what]() if what in KINDS else settings(what)
    if as_json:
        return say_json([dict(zip(header, line, strict=True)) for line in lines])
    from ...artifacts.reporting.terminal import listed, terminal_width

    say(listed(header, lines, terminal_width()))


def architecture(
    model: Annotated[str, typer.Argument(help=f"{ANY_MODEL}, or a config.json; weights are not needed.")],
    as_json: Json = False,
) -> None:
    """Show whether a model type can be edited, with the proof.

    The proof is made on a small copy of the model. Exit code 0 if it can be edited, 2 if not.
    """
    from .. import architecture as recipe

    settle()
    proof = recipe.run(model)
    if as_json:
        say_json(recipe.record(proof))
    else:
        from ...artifacts.reporting.terminal import terminal_width

        say(recipe.text(proof, terminal_width()))
    if not proof.proved:
        raise SystemExit(2)


def chat(
    model: Annotated[str, typer.Argument(help=f"Model to talk to: {ANY_MODEL}.")],
    base: Annotated[
        str | None, typer.Option(help="Model it was made from; by default the one that its record names.")
    ] = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="Talk to the model alone.")] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw replies at random instead of the likeliest words.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens for each reply.")] = 60,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk to an edited model and its base side by side.

    Each prompt stands alone: earlier ones are not shown to the models. /quit or Ctrl-D ends it. Without a terminal,
    each line of stdin is a prompt.
    """
    from ...artifacts.reporting.terminal import terminal_width
    from .. import chat as recipe
    from . import shown
    from .session import prompts

    settle()
    job = recipe.prepare(model, base, alone=no_base, device=device, dtype=dtype)
    models = recipe.load(job, Events(watcher=watcher()))
    for turn, prompt in enumerate(prompts()):
        # Another seed each turn, so that a prompt that comes again gets another reply.
        replies = recipe.replies(models, prompt, max_new_tokens, seed + turn if sample else None)
        say(shown.side_by_side(replies, terminal_width()) + "\n")


def card(folder: Folder) -> None:
    """Show a checkpoint's card in the terminal."""
    from ...artifacts.checkpoints.manifest import check_unchanged, checkpoint_of
    from ...artifacts.files.opened import OF_A_CHECKPOINT, read_text
    from ...artifacts.reporting.card import CARD, body
    from ...artifacts.reporting.results import RESULTS

    path = checkpoint_of(folder) / CARD
    if not path.is_file():
        raise RequestError(f"{folder} has no card ({CARD}); `excise eval {folder} --concept PACK` measures it")
    # The card's numbers are those of eval.json; a card that was written over may hold any.
    measured = [RESULTS] if (path.parent / RESULTS).exists() else []
    check_unchanged(path.parent, [CARD, *measured])
    with OF_A_CHECKPOINT.about(path):
        text = body(read_text(path))
    if not sys.stdout.isatty():
        return say(text)
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def report(folder: Folder, out: Annotated[Path, typer.Option(help="The HTML file to write.")]) -> None:
    """Write a checkpoint's report as one HTML file.

    It holds measurements, replies and the audit, and opens offline.
    """
    from ...artifacts.checkpoints.manifest import checkpoint_of
    from ...artifacts.checkpoints.staging import refuse_existing
    from ...artifacts.reporting.report import report_of

    refuse_existing(out)
    report_of(checkpoint_of(folder), out)
    say(f"report  {out}")


def inspect(
    where: Annotated[
        Path, typer.Argument(help="A directions.safetensors, a caft run's folder, or an autoencoder's folder.")
    ],
    model: Annotated[str, typer.Option(help=f"Model that the directions belong to: {ANY_MODEL}.")],
    concept: Annotated[
        str | None, typer.Option(help="Concept pack whose texts are read: builtin:NAME or a folder.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="JSON lines of texts to read instead of a concept pack's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write inspect.json and inspect.html into.")] = None,
    latents: Annotated[str, typer.Option(help="Show these latents of an autoencoder, e.g. 3,17.")] = "",
    top: Annotated[int | None, typer.Option(min=1, help="Show the N highest-scoring SAE latents (default 20).")] = None,
    score: Annotated[
        str | None,
        typer.Option(help="Score latents by contrast (of the pack's pairs) or attribution (to the texts' loss)."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Inspect directions or SAE latents.

    Shows top tokens, top contexts and the loss when ablated.
    """
    from dataclasses import asdict

    from ...artifacts.checkpoints.sae import is_autoencoder
    from ...artifacts.reporting.terminal import next_steps, terminal_width
    from .. import inspect as recipe
    from . import shown

    chosen = integers("--latents", latents)
    settle()
    with Events(watcher=watcher()).stage("look at directions") as stage:
        looked = recipe.inspect(
            where, model, concept, texts, out, device, dtype, stage.advance, latents=chosen, top=top, score=score
        )
    if as_json:
        return say_json(asdict(looked))
    say(shown.inspection(looked, terminal_width()))
    if out:
        say(f"\npage  {out / 'inspect.html'}")
    keys = (
        f"directions=sae --set sae={where} --set latents="
        if is_autoencoder(where)
        else "directions_file=FILE --set pick="
    )
    say("\n" + next_steps([f"excise run caft --set {keys}[...]"]))


def localize(
    model: Annotated[str, typer.Argument(help=f"Model to look into: {ANY_MODEL}.")],
    concept: Annotated[str, typer.Option(help="Knowledge pack whose facts are traced: builtin:NAME or a folder.")],
    facts: Annotated[int, typer.Option(min=5, help="Trace at most this many facts.")] = 128,
    checked: Annotated[
        int, typer.Option(min=0, help="Check the estimates by exact patching on this many facts; slow for deep models.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Seed that draws facts and the subjects they are compared with.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write localize.json and localize.svg into.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Show in which layers a model computes a concept's facts.

    Each site's activation is put from a prompt into the same prompt about another subject (activation patching); the
    share of the right answer that comes back is the site's effect.
    """
    from dataclasses import asdict

    from ...artifacts.checkpoints.staging import refuse_existing
    from ...artifacts.reporting.terminal import next_steps, paths, terminal_width
    from .. import localize as recipe
    from . import shown

    if out:
        refuse_existing(out)
    settle()
    job = recipe.prepare(model, concept, facts=facts, checked=checked, seed=seed)
    found = recipe.run(job, Events(watcher=watcher()), device, dtype)
    if out:
        recipe.write(found, out)
    if as_json:
        return say_json(asdict(found))
    say(shown.localization(found, terminal_width()))
    if out:
        say("\n" + paths({"table": out / "localize.json", "heat map": out / "localize.svg"}))
    first, last = found.window
    say("\n" + next_steps([f"excise run elm --model {model} --concept {concept} --set layers={first}-{last}"]))


def diff(
    a: Annotated[str, typer.Argument(help=f"A model: {ANY_MODEL}.")],
    b: Annotated[str, typer.Argument(help="A model that was made from it.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write diff.json and diff.svg into.")] = None,
    spectrum: Annotated[
        bool, typer.Option(help="Show rank and singular values of each change; slow for wide models.")
    ] = True,
    most: Annotated[int, typer.Option(min=1, help="Show at most this many tensors, the most changed first.")] = 20,
    as_json: Json = False,
) -> None:
    """Show which tensors of two models differ, and by how much."""
    from ...artifacts.checkpoints.staging import refuse_existing
    from ...artifacts.reporting.terminal import paths, terminal_width
    from .. import diff as recipe
    from . import shown

    if out:
        refuse_existing(out)
    with Events(watcher=watcher()).stage("compare tensors") as stage:
        difference = recipe.difference(a, b, spectrum=spectrum, advance=stage.advance)
    if out:
        recipe.write(difference, out)
    if as_json:
        return say_json(difference.describe())
    say(shown.difference(difference, most, terminal_width()))
    if out:
        say("\n" + paths({"table": out / "diff.json", "plot": out / "diff.svg"}))


def ui(
    folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes any free one.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Open a folder of runs in the browser (extra: ui).

    Its pages compare runs, show cards and reports, chat and audit. Only this machine can reach them.
    """
    from ..ui.server import serve

    settle()
    serve(folder, port, device, dtype, lambda address: say(f"page  {address}\nCtrl-C ends it."))
