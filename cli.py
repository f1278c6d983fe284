"""The command line: parses, calls, prints. Nothing heavy is imported until a command needs it."""

import importlib
import json
import os
import signal
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from .artifacts.events import Events
from .editing.errors import ExciseError, RequestError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Edit a language model's weights, measure what the edit did, and ship the result.",
    epilog="Errors are one line; add --debug to any command for the traceback. Exit codes: 0 done, 1 the run failed, "
    "2 the request was wrong, 130 interrupted.",
)  # fmt: skip
testbed_app = typer.Typer(no_args_is_help=True, help="Worlds whose every fact is known.")
app.add_typer(testbed_app, name="testbed")

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")]


@app.command(
    epilog="Example: excise run orthogonalize --model HuggingFaceTB/SmolLM2-135M-Instruct --concept my-concept/"
)
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe; `excise list recipes` shows all.")],
    model: Annotated[
        str | None, typer.Option(help="builtin:NAME, a Hub id[@revision], a folder or a .gguf file.")
    ] = None,
    concept: Annotated[str | None, typer.Option(help="builtin:NAME or a concept folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/RECIPE-N by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="One setting; may be repeated. `excise list RECIPE` shows all."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be touched; load no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: edit a model, measure the edit, write OUT/checkpoint and OUT/report.html."""
    from .recipes import RECIPES
    from .recipes.common.run_folder import resumed
    from .recipes.common.settings import load_settings

    if recipe not in RECIPES:
        raise RequestError(f"no recipe {recipe!r}{_nearest(recipe, list(RECIPES))}; recipes: {', '.join(RECIPES)}")
    module = importlib.import_module(RECIPES[recipe].module)
    flags = {"model": model, "concept": concept, "out": out, "seed": seed, "device": device, "dtype": dtype}
    settings = load_settings(getattr(module, RECIPES[recipe].settings), config, set_ or [], flags)
    if resume:
        settings = resumed_or_finished(settings, resumed)
    _settle()
    prepared = module.prepare(settings, resume=resume)
    if dry_run:
        _print_plan(module.describe(prepared), as_json)
        return
    finished = module.run(prepared, Events(watcher=_watcher()))
    if as_json:
        print(json.dumps({"out": str(finished.out), **finished.results}))  # noqa: T201
    else:
        _print_run(finished)


@app.command(
    epilog="Example: excise apply runs/mine/checkpoint/excise --base meta-llama/Llama-3.1-8B-Instruct --out edited"
)
def apply(
    edit: Annotated[Path, typer.Argument(help="Folder with edit.json and edit.safetensors.")],
    base: Annotated[str, typer.Option(help="Checkpoint to edit.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be touched; read no weights.")] = False,
    as_json: Json = False,
) -> None:
    """Apply a saved edit to a checkpoint of any size; streams, never loads the model."""
    from .recipes import apply as recipe

    prepared = recipe.prepare(edit, base, out)
    if dry_run:
        _print_plan(recipe.describe(prepared), as_json)
        return
    export = recipe.run(prepared, Events(watcher=_watcher()))
    worst = recipe.worst_residual(export)
    result = {
        "out": str(out), "tensors_changed": sum(change.changed for change in export.changes),
        "tensors_declared": len(export.changes), "bytes_written": export.bytes_written,
        "largest_residual": worst[0] if worst else None, "largest_residual_tensor": worst[1] if worst else None,
    }  # fmt: skip
    if as_json:
        print(json.dumps(result))  # noqa: T201
        return
    left = f"; at most {worst[0]:.1e} of the component is left ({worst[1]})" if worst else ""
    _say(f"{result['tensors_changed']} of {result['tensors_declared']} declared tensors changed{left}")
    _say(
        f"{out} is complete ({export.bytes_written / 1e9:.2f} GB); `excise verify {out}` checks it, `excise eval {out}` measures it"
    )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Any model: builtin:NAME, Hub id, folder or .gguf file.")],
    concept: Annotated[str, typer.Option(help="builtin:NAME or a concept folder.")],
    base: Annotated[str | None, typer.Option(help="The model it was made from, measured on the same items.")] = None,
    questions: Annotated[int, typer.Option(min=0, help="Questions and texts a split, at most; 0 takes all.")] = 0,
    judge: Annotated[
        list[str] | None, typer.Option(help="A further model to read the replies on knowledge; may be given again.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            help="Also named benchmarks, comma-separated: tasks of the lm-evaluation-harness, or YAML files of one's own, whose code runs.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure any model with a concept pack."""
    from .artifacts.reporting.results import read_measurements, table
    from .eval.model_under_test import EvalSettings
    from .recipes import evaluate as recipe

    _settle()
    job = recipe.prepare(
        [model], concept, base, device=device or "auto", dtype=dtype or "auto",
        settings=EvalSettings(questions=questions), judges=judge or (),
        benchmarks=[name.strip() for name in lm_eval.split(",") if name.strip()] if lm_eval else (),
    )  # fmt: skip
    evaluation = recipe.run(job, Events(watcher=_watcher()))
    if as_json:
        print(json.dumps(evaluation.as_json()))  # noqa: T201
    else:
        _print_table(table(read_measurements(evaluation.results[0])))


@app.command(
    epilog="Example: excise audit runs/elm-1 --concept builtin:potions --base builtin:testbed --out audits/elm"
)
def audit(
    model: Annotated[str, typer.Argument(help="The model to audit, or the folder of a run.")],
    concept: Annotated[str | None, typer.Option(help="builtin:NAME or a concept folder.")] = None,
    base: Annotated[str | None, typer.Option(help="The model it was made from.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="A model that never knew; without one, new facts are taught.")
    ] = None,
    attacks: Annotated[
        str | None, typer.Option(help="Names, comma-separated; `excise list attacks` shows all.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="quick, standard or long.")] = None,
    questions: Annotated[int | None, typer.Option(min=0, help="Questions to ask, at most; 0 takes all.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Also put the audit into the checkpoint's card.")] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Attack base and controls anew, although an earlier audit kept their curves."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write; runs/audit-N by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be attacked; load no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished audit in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Does an edit hold? Attack the model, its base and one that never knew, and judge."""
    from .recipes.audit import recipe
    from .recipes.common.run_folder import resumed
    from .recipes.common.settings import load_settings

    inner = Path(model) / "checkpoint"
    flags = {
        "model": str(inner) if inner.is_dir() else model, "concept": concept, "base": base, "reference": reference, "out": out,
        "attacks": attacks.split(",") if attacks else None, "budget": budget, "seed": seed, "device": device, "dtype": dtype,
        "card": card or None, "questions": questions, "fresh": fresh or None,
    }  # fmt: skip
    settings = load_settings(recipe.AuditSettings, None, [], flags)
    if resume:
        settings = resumed(settings)
    _settle()
    prepared = recipe.prepare(settings, resume=resume)
    if dry_run:
        _print_plan(recipe.describe(prepared), as_json)
        return
    results = recipe.run(prepared, Events(watcher=_watcher()))
    if as_json:
        print(json.dumps({"out": str(prepared.out), **results}))  # noqa: T201
    else:
        _print_audit(results, prepared.out)


@app.command(epilog="Example: excise compare runs/elm-1 runs/rmu-1 --out runs/both")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs on one concept.")],
    out: Annotated[Path, typer.Option(help="Folder to write compare.md, compare.json and compare.png into.")],
    as_json: Json = False,
) -> None:
    """Put runs side by side: one table, and a plot of forgetting against keeping."""
    from .artifacts.checkpoints.staging import refuse_existing
    from .recipes import compare as recipe

    refuse_existing(out)
    lines = recipe.compare(runs, out)
    if as_json:
        print((out / "compare.json").read_text(encoding="utf-8"))  # noqa: T201
        return
    _print_comparison(lines, list(recipe.COLUMNS))
    _say(f"\ntable  {out / 'compare.md'}\nplot   {out / 'compare.png'}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that excise wrote, or a run's folder.")],
    key: Annotated[Path | None, typer.Option(help="PEM file of the public key that must have signed it.")] = None,
    as_json: Json = False,
) -> None:
    """Check every file of a published folder against its checksums, and the checksums against a signature."""
    from .artifacts.checkpoints.manifest import SIGNATURE, verify_folder

    target = _checkpoint(folder)
    count = verify_folder(target)
    if key:
        from .artifacts.checkpoints.signature import check_signature

        check_signature(target, key)
    if as_json:
        print(json.dumps({"folder": str(target), "files": count, "verified": True, "signed": bool(key)}))  # noqa: T201
        return
    _say(f"{target}: {count} files, all as published")
    if key:
        _say(f"signed with the key of {key}")
    elif (target / SIGNATURE).is_file():
        _say("it carries a signature, which was not checked; give --key PUBLIC.pem")


@app.command(epilog="Example: excise sign runs/elm-1 --key key.pem, then excise verify runs/elm-1 --key public.pem")
def sign(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that excise wrote, or a run's folder.")],
    key: Annotated[Path, typer.Option(help="PEM file of an elliptic curve private key.")],
    password: Annotated[
        str | None, typer.Option(envvar="EXCISE_KEY_PASSWORD", help="Of the key; better given by EXCISE_KEY_PASSWORD.")
    ] = None,
) -> None:
    """Sign a published folder's checksums, so that others can tell who published it (extra: sign)."""
    from .artifacts.checkpoints.signature import sign_folder

    _say(f"signature  {sign_folder(_checkpoint(folder), key, password)}")


@app.command(epilog="Example: excise push runs/elm-1 my-name/my-model --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that excise wrote, or a run's folder.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; made if it is not there.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a new repository; else only you.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Push although nothing was measured; the card says so first.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify and print what would be sent; ask the Hub nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a verified checkpoint with its card on the Hugging Face Hub."""
    from .artifacts import push as upload

    request = upload.prepare_push(
        _checkpoint(folder), repo_id, public=public, revision=revision, create_pr=create_pr, unmeasured=unmeasured
    )
    if dry_run:
        _print_plan(request.describe(), as_json)
        return
    _quiet_hub()
    done = upload.push(request)
    if as_json:
        print(json.dumps({**request.describe(), "url": done.url, "commit": done.commit, "new_commit": done.new_commit}))  # noqa: T201
    elif done.new_commit:
        _say(f"{done.url} holds it at commit {done.commit}; every file arrived as it was sent")
        _say(f"others get it with: excise pull {repo_id} --out DIR, or from_pretrained({repo_id!r})")
    else:
        _say(f"{done.url} held all of it already, at commit {done.commit}; nothing was sent")


@app.command(epilog="Example: excise pull someone/model@main --out model")
def pull(
    ref: Annotated[
        str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="Repository, and a branch, tag or commit.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    as_json: Json = False,
) -> None:
    """Download a model at a commit and check every byte; nothing that fails the check is left behind."""
    from .artifacts import pull as download

    _quiet_hub()
    done = download.pull(ref, out)
    if as_json:
        about = {
            "out": str(out),
            "commit": done.commit,
            "files": done.files,
            "made_by_excise": done.made_by_excise,
            "left_out": done.left_out,
        }
        print(json.dumps(about))  # noqa: T201
        return
    if done.made_by_excise:
        _say(f"{out}: {done.files} files, all as published, at commit {done.commit}")
    else:
        _say(f"{out}: {done.files} files, as the Hub lists them, at commit {done.commit}")
        _say("excise did not make this model: it carries no checksums and no measurements of its own")
        if done.left_out:
            _say(f"{done.left_out} of its files are neither safetensors nor configuration and were not fetched")
    _say(
        f"look at it: excise card {out}; measure it: excise eval {out} --concept PACK; attack it: excise audit {out} --concept PACK"
    )


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A checkpoint or a run's folder.")],
) -> None:
    """Show a checkpoint's card in the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    from .artifacts.reporting.card import body

    path = _checkpoint(folder) / "README.md"
    if not path.is_file():
        raise RequestError(f"{folder} has no card (README.md); `excise eval {folder} --concept PACK` measures it")
    text = body(path.read_text(encoding="utf-8"))
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        _say(text)


@app.command(epilog="Example: excise report pulled/my-model --out my-model.html")
def report(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint that excise wrote, pulled or your own, or a run's folder.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
) -> None:
    """Write a checkpoint's report: one HTML file with its measurements, replies and audit, which opens offline."""
    from .artifacts.checkpoints.staging import refuse_existing
    from .artifacts.reporting.report import report_of

    refuse_existing(out)
    report_of(_checkpoint(folder), out)
    _say(f"report  {out}")


@app.command(epilog="Example: excise inspect runs/caft-1 --model builtin:testbed --concept builtin:shortcut --out look")
def inspect(
    where: Annotated[
        Path, typer.Argument(help="A directions.safetensors, the folder of a caft run, or of an autoencoder.")
    ],
    model: Annotated[str, typer.Option(help="The model they were learned on.")],
    concept: Annotated[str | None, typer.Option(help="Pack whose texts are looked through.")] = None,
    texts: Annotated[Path | None, typer.Option(help="JSON lines of texts to look through instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write inspect.json and inspect.html into.")] = None,
    latents: Annotated[str, typer.Option(help="Of an autoencoder, these: 3,17.")] = "",
    top: Annotated[
        int | None, typer.Option(help="Of an autoencoder, so many latents by score, where none are named: 20.", min=1)
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="contrast (of the pack's pairs) or attribution (to the texts' loss).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """What directions stand for: tokens and contexts at both ends, and what ablating each alone costs."""
    from .artifacts.checkpoints.sae import is_autoencoder
    from .recipes import inspect as inspection

    _settle()
    with Events(watcher=_watcher()).stage("look at directions") as stage:
        looked = inspection.inspect(
            where, model, concept, texts, out, device or "auto", dtype or "auto", stage.advance, latents=_numbers(latents), top=top,
            score=score,
        )  # fmt: skip
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(looked)))  # noqa: T201
        return
    _say(
        f"looked through {looked.texts} texts" + (f"; {looked.left_out} more were left out" if looked.left_out else "")
    )
    for item in looked.directions:
        _say(f"{item.index}  {item.name} at the {item.place}: score {item.score:.4g}, projection {item.mean:.3f} ± {item.deviation:.3f}, "
             f"effect {item.effect:+.4f} nats a token")  # fmt: skip
        for sign, tokens, contexts in (("+", item.top_tokens, item.top), ("-", item.bottom_tokens, item.bottom)):
            _say(f"   {sign} tokens {' '.join(repr(token)[1:-1] for token in tokens)}")
            for context in contexts[:2]:
                line = f"{context.before}[{context.token}]{context.after}"
                _say(f"   {sign} {context.projection:+.2f}  {' '.join(line.split())[:110]}")
    if out:
        _say(f"\npage  {out / 'inspect.html'}")
    chosen = (
        f"directions=sae --set sae={where} --set latents=[...]"
        if is_autoencoder(where)
        else "directions_file=FILE --set pick=[...]"
    )
    _say(f"ablate some of them with: excise run caft --set {chosen}")


@app.command(epilog="Example: excise diff builtin:testbed runs/elm-1")
def diff(
    a: Annotated[str, typer.Argument(help="A model: builtin:NAME, Hub id, folder or run.")],
    b: Annotated[str, typer.Argument(help="What was made of it.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write diff.json and diff.svg into.")] = None,
    spectrum: Annotated[
        bool, typer.Option(help="Decompose each change: rank and singular values; slow for wide models.")
    ] = True,
    most: Annotated[int, typer.Option(min=1, help="Tensors to show, the most changed first.")] = 20,
    as_json: Json = False,
) -> None:
    """Which tensors two checkpoints differ in, by how much, and in how many directions; reads one tensor at a time."""
    from .artifacts.checkpoints.staging import refuse_existing
    from .recipes import diff as recipe

    if out:
        refuse_existing(out)
    refs = [str(_checkpoint(Path(ref))) if Path(ref).is_dir() else ref for ref in (a, b)]
    with Events(watcher=_watcher()).stage("compare tensors") as stage:
        found = recipe.difference(*refs, spectrum=spectrum, advance=stage.advance)
    if out:
        recipe.write(found, out)
    if as_json:
        print(json.dumps(found.describe()))  # noqa: T201
        return
    _print_difference(found, most)
    if out:
        _say(f"\ntable  {out / 'diff.json'}\nplot   {out / 'diff.svg'}")


@app.command(epilog="Example: excise reproduce runs/orthogonalize-1 --out runs/again")
def reproduce(
    what: Annotated[str, typer.Argument(help="A run, a checkpoint that excise wrote, or OWNER/NAME[@REVISION].")],
    out: Annotated[Path, typer.Option(help="Folder to write the new run into.")],
    model: Annotated[str | None, typer.Option(help="Where the base is, if it was a local one.")] = None,
    concept: Annotated[str | None, typer.Option(help="Where the concept pack is, if it was a local one.")] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="KEY=PATH of another local file it was made with, as data=rows.jsonl.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the recorded recipe again; compare weights by SHA-256, or measurements where the platform differs."""
    from .recipes import reproduce as recipe
    from .recipes.common.run_folder import refuse_taken

    refuse_taken(out)
    _settle()
    with ExitStack() as stack:
        if Path(what).is_dir():
            folder = _checkpoint(Path(what))
        else:
            from .artifacts import pull as download

            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-"))) / "published"
            download.pull(what, folder)
        prepared = recipe.prepare(folder, out, model=model, concept=concept, files=file or [])
        done = recipe.run(prepared, Events(watcher=_watcher()))
    if as_json:
        about = {"out": str(done.out), "identical": done.identical, "holds": done.holds, "changed_files": done.changed_files,
                 "outside": done.outside, "compared": done.compared, "differences": done.differences}  # fmt: skip
        print(json.dumps(about))  # noqa: T201
    else:
        _print_reproduced(done)
    if not done.holds:
        raise SystemExit(1)


@app.command(epilog="Example: excise ui runs, then open the address that it prints")
def ui(
    folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes any that is free.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Look through a folder of runs in the browser: compare, read, chat, audit (extra: ui). Only this machine can reach it."""
    from .recipes.ui.server import serve

    _settle()
    serve(folder, port, device or "auto", dtype or "auto", lambda address: _say(f"page  {address}\nCtrl-C ends it."))


@app.command("list", epilog="Example: excise list elm")
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="recipes, measurements, attacks, architectures, concepts or models; or a recipe, for its settings."
        ),
    ] = "recipes",
    as_json: Json = False,
) -> None:
    """List recipes, measurements, attacks, architectures, concepts, models or a recipe's settings."""
    from .recipes import RECIPES

    kinds = {
        "recipes": _recipes, "measurements": _measurements, "architectures": _architectures,
        "concepts": _concepts, "models": _models, "attacks": _attacks,
    }  # fmt: skip
    if what not in kinds and what not in RECIPES:
        raise RequestError(
            f"nothing called {what!r} to list{_nearest(what, [*kinds, *RECIPES])}; give one of {', '.join(kinds)}, or a "
            f"recipe for its settings: {', '.join(RECIPES)}"
        )
    header = ("setting", "default", "about") if what in RECIPES else ("name", "about")
    lines: list[tuple[str, ...]] = [*(_settings(what) if what in RECIPES else kinds[what]())]
    if as_json:
        print(json.dumps([dict(zip(header, line, strict=True)) for line in lines]))  # noqa: T201
    else:
        _print_lines(lines, header if what in RECIPES else None)


@testbed_app.command("build")
def testbed_build(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the world, its texts and both models.")] = 0,
    reference: Annotated[
        bool, typer.Option(help="Also train the twin that never reads about the forget domain.")
    ] = True,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the first phase; with far fewer than the default the world is not known."),
    ] = None,
) -> None:
    """Make another world of any seed: a model that knows it, its twin, and concept packs. About 20 minutes a model."""
    from .recipes.testbed.build import TestbedSettings, build_testbed

    _settle()
    asked = {} if steps is None else {"steps": steps}
    build_testbed(TestbedSettings(seed=seed, reference=reference, **asked), out, Events(watcher=_watcher()))
    _say(f"{out} is complete; try: excise run orthogonalize --model {out}/testbed --concept {out}/concepts/declining")


def main() -> None:
    """Entry point: turns every error into one line and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    # Not by way of SIGINT, which a shell's background jobs ignore.
    signal.signal(signal.SIGTERM, _stop)
    try:
        code = app(args=arguments, prog_name="excise", standalone_mode=False)
        if code == INTERRUPTED:
            # The parser swallows an interrupt and returns its code.
            raise KeyboardInterrupt
    except BaseException as error:
        if debug:
            raise
        code = _explain(error)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def resumed_or_finished(settings: Any, resumed: Any) -> Any:
    """Settings of an unfinished run; a finished one ends the command as done."""
    if settings.out is not None and (settings.out / "checkpoint").exists():
        _say(f"{settings.out} is complete already; `excise verify {settings.out}` checks it")
        raise SystemExit(0)
    return resumed(settings)


def _explain(error: BaseException) -> int:
    """Print one line on stderr; return the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return _fail(
            "stopped; nothing unfinished looks finished. The same command with --out DIR --resume goes on",
            INTERRUPTED,
        )
    if isinstance(error, ExciseError):
        return _fail(str(error), error.exit_code)
    if hasattr(error, "format_message"):
        return _fail(f"{error.format_message()}; see `excise --help`", 2)
    if isinstance(error, OSError) and error.errno == 28:
        return _fail("the disk is full; nothing half-written was kept. Free some space and run again with --resume", 1)
    if isinstance(error, OSError):
        return _fail(
            f"{error.strerror or error} ({error.filename or 'no file named'}); check the path and its permissions", 1
        )
    return _fail(
        f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}; run again with --debug and report it",
        1,
    )


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"excise: {message}\n")
    return code


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _nearest(word: str, words: list[str]) -> str:
    from .editing.errors import nearest

    return nearest(word, words)


def _settle() -> None:
    """Before a model: memory is used again, libraries keep their own bars and notices off the terminal."""
    from .recipes.common.memory import keep_freed_memory

    keep_freed_memory()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What libraries say to their own developers.
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _quiet_hub() -> None:
    """The client's own bars are shown on a terminal alone; nothing is told to anybody."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _checkpoint(folder: Path) -> Path:
    """A run's checkpoint, or the folder itself."""
    from .artifacts.checkpoints.manifest import SUMS

    inner = folder / "checkpoint"
    return inner if inner.is_dir() and not (folder / SUMS).exists() else folder


def _watcher() -> Any:
    if not sys.stderr.isatty():
        return None
    from .artifacts.progress import Terminal

    return Terminal()


def _print_plan(plan: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan))  # noqa: T201
        return
    for key, value in plan.items():
        shown = f"{value / 1e6:,.1f} MB" if "bytes" in key else value
        _say(f"{key.replace('_bytes', '').replace('bytes_', '').replace('_', ' '):<22} {shown}")


def _print_run(finished: Any) -> None:
    from .artifacts.reporting.findings import findings
    from .artifacts.reporting.results import read_measurements, table

    for sentence in findings(finished.results):
        _say(f"- {sentence}")
    _say("")
    _print_table(table(read_measurements(finished.results)))
    _say(f"\ncheckpoint  {finished.out / 'checkpoint'}\nreport      {finished.out / 'report.html'}")


def _print_table(rows: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .artifacts.reporting.results import format_difference, format_value

    reference = any(row.reference for row in rows)
    based = any(row.base for row in rows)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in [
        "measurement",
        "split",
        "n",
        *(["base", "edited", "edited - base"] if based else ["value"]),
        *(["reference"] if reference else []),
    ]:
        shown.add_column(name, justify="right" if name == "n" else "left", no_wrap=True)
    for row in rows:
        compared = [format_value(row.base) or ("0 by definition" if row.name == "kl_from_base" else ""),
                    format_value(row.edited), format_difference(row.edited)]  # fmt: skip
        cells = compared if based else [format_value(row.edited)]
        skipped = f" ({row.skipped} skipped)" if row.skipped else ""
        shown.add_row(
            row.name, row.split, f"{row.n}{skipped}", *cells, *([format_value(row.reference)] if reference else [])
        )
    # Piped output keeps its columns; a narrow terminal still gets whole lines.
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    console.print(shown)


def _print_audit(results: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from .artifacts.reporting.audit_page import HEADLINES, best, estimate, tokens

    _say(f"{HEADLINES[results['verdict']]}.")
    for reason in results["reasons"]:
        _say(f"- {reason}")
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("attack", "base", "edited", "reference", "share regained", "leak", "tokens to 50%"):
        shown.add_column(name, no_wrap=True)
    untouched = [f"{results['untouched'][name]:.3f}" for name in ("base", "edited", "reference")]
    shown.add_row("none", *untouched)
    for attack in results["attacks"]:
        values = [best(attack, name) for name in ("base", "edited", "reference")]
        reached = tokens(attack, "t50") if len(attack["curve"]) > 1 else ""
        shown.add_row(attack["name"], *values, estimate(attack["regained"]), estimate(attack["rtt_leak"]), reached)
    _say("")
    Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True).print(shown)
    for gap in results["gaps"]:
        _say(f"not tested: {gap}")
    if results["recalled"]:
        _say(f"curves of {', '.join(results['recalled'])} are an earlier audit's; --fresh makes them again")
    _say(f"\naudit   {out / 'audit.json'}\nreport  {out / 'report.html'}\ncard    {out / 'card.md'}")


def _print_difference(found: Any, most: int) -> None:
    from rich.console import Console
    from rich.table import Table

    _say(f"{len(found.changed)} tensors differ, {found.same} are equal bit for bit")
    for names, where in ((found.only_in_a, found.a), (found.only_in_b, found.b)):
        if names:
            _say(f"only in {where}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}")
    if not found.changed:
        return
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tensor", "shape", "|B-A| / |A|", "largest", "effective rank", "singular values"):
        shown.add_column(name, no_wrap=True)
    for item in found.changed[:most]:
        rank = "" if item.effective_rank is None else f"{item.effective_rank:.1f}"
        values = " ".join(f"{value:.3g}" for value in item.singular_values)
        shape = "×".join(map(str, item.shape))
        relative = "was zero" if item.relative_norm is None else f"{item.relative_norm:.4f}"
        shown.add_row(item.name, shape, relative, f"{item.largest:.3g}", rank, values)
    Console(width=None if sys.stdout.isatty() else 180, soft_wrap=True).print(shown)
    if len(found.changed) > most:
        _say(f"and {len(found.changed) - most} more; --most shows them")


def _print_reproduced(done: Any) -> None:
    for difference in done.differences:
        _say(f"not as it was: {difference}")
    if done.identical:
        _say(f"the same weights came out, bit for bit; {done.out}")
        return
    _say(f"other weights came out: {', '.join(done.changed_files)}")
    inside = done.compared - len(done.outside)
    _say(f"{inside} of {done.compared} measurements lie within their published intervals; {done.out}")
    for line in done.outside:
        _say(f"- outside: {line}")
    if not done.differences:
        _say("packages and platform are the published ones, so the weights should have been the same; report it")


def _print_comparison(lines: list[Any], columns: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .artifacts.reporting.results import format_value

    # A column a model: there are more measurements than models.
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ["", *(f"{line.name}\n{line.recipe}" for line in lines)]:
        shown.add_column(heading, no_wrap=True)
    for name in columns:
        if any(name in line.values for line in lines):
            shown.add_row(name, *(format_value(line.values.get(name)) for line in lines))
    shown.add_row("seconds to learn", *("" if line.seconds is None else f"{line.seconds:.0f}" for line in lines))
    Console(width=None if sys.stdout.isatty() else 30 * (len(lines) + 1), soft_wrap=True).print(shown)


def _print_lines(lines: list[tuple[str, ...]], header: tuple[str, ...] | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, show_header=header is not None, header_style="bold")
    last = len(lines[0]) - 1
    for place, heading in enumerate(header or lines[0]):
        shown.add_column(heading, no_wrap=place < last, overflow="fold")
    for line in lines:
        shown.add_row(*map(Text, line))
    # In a file or a pipe each stays one line.
    Console(width=None if sys.stdout.isatty() else 1000).print(shown)


def _numbers(text: str) -> list[int]:
    from .editing.errors import RequestError

    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise RequestError(f"{text!r} are no numbers; write them as 3,17") from error


def _settings(recipe: str) -> list[tuple[str, str, str]]:
    from .recipes import RECIPES
    from .recipes.common.settings import settings_help

    return settings_help(getattr(importlib.import_module(RECIPES[recipe].module), RECIPES[recipe].settings))


def _recipes() -> list[tuple[str, str]]:
    from .recipes import RECIPES

    return [(name, recipe.about) for name, recipe in RECIPES.items()]


def _measurements() -> list[tuple[str, str]]:
    from .eval.measurements import MEASUREMENTS

    return [(name, kind.about) for name, kind in MEASUREMENTS.items()]


def _attacks() -> list[tuple[str, str]]:
    from .recipes.audit.attacks.table import ATTACKS

    return [(name, attack.about) for name, attack in ATTACKS.items()]


def _architectures() -> list[tuple[str, str]]:
    from .editing.architectures import ARCHITECTURES

    return [
        (name, ", ".join(sorted({w.pattern.split(".")[-2] if "." in w.pattern else w.pattern for w in row.writers})))
        for name, row in sorted(ARCHITECTURES.items())
    ]


def _concepts() -> list[tuple[str, str]]:
    from .artifacts.concepts import builtin_concepts, load_concept

    refs = [f"builtin:{name}" for name in builtin_concepts()]
    return [(ref, load_concept(ref).about.description) for ref in refs]


def _models() -> list[tuple[str, str]]:
    from .artifacts.models.source import builtin_models

    about = {
        "testbed": "knows a closed world of 800 facts",
        "testbed-reference": "its twin, which never read about potions",
    }
    return [(f"builtin:{name}", about.get(name, "")) for name in builtin_models()]


if __name__ == "__main__":
    main()
