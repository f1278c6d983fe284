"""Commands that publish models and check what others published: verify, sign, push, pull and reproduce."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from ...artifacts.events import Events
from .failures import interruptible
from .flags import Folder, Json, say, say_json, say_plan
from .session import quiet_hub, settle, watcher


def verify(
    folder: Folder,
    key: Annotated[Path | None, typer.Option(help="PEM file of the public key that must have signed it.")] = None,
    as_json: Json = False,
) -> None:
    """Check that a checkpoint is as it was published.

    Compares every file with its checksum and, with --key, the checksums with their signature.
    """
    from ...artifacts.checkpoints.manifest import SIGNATURE, checkpoint_of, verify_folder

    target = checkpoint_of(folder)
    count = verify_folder(target)
    if key:
        from ...artifacts.checkpoints.signature import check_signature

        check_signature(target, key)
    if as_json:
        return say_json({"folder": str(target), "files": count, "verified": True, "signed": bool(key)})
    say(f"{target}: {count} files, all as published")
    if key:
        say(f"signed with the key of {key}")
    elif (target / SIGNATURE).is_file():
        say("it carries a signature, which was not checked; give --key PUBLIC.pem")


def sign(
    folder: Folder,
    key: Annotated[Path, typer.Option(help="PEM file of an elliptic curve private key.")],
    password: Annotated[
        str | None,
        typer.Option(envvar="EXCISE_KEY_PASSWORD", help="Password of the key; better set in EXCISE_KEY_PASSWORD."),
    ] = None,
) -> None:
    """Sign a checkpoint's checksums (extra: sign).

    Others can then check who published it: excise verify --key.
    """
    from ...artifacts.checkpoints.manifest import checkpoint_of
    from ...artifacts.checkpoints.signature import sign_folder

    say(f"signature  {sign_folder(checkpoint_of(folder), key, password)}")


def push(
    folder: Folder,
    repo_id: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see a new repository; by default only you can.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of pushing.")] = False,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Push although nothing was measured; the card starts with a warning.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Verify, and print what would be sent, without asking the Hub.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a checkpoint and its card on the Hugging Face Hub.

    The checkpoint is verified first.
    """
    from ...artifacts import push as upload
    from ...artifacts.checkpoints.manifest import checkpoint_of

    request = upload.prepare_push(
        checkpoint_of(folder), repo_id, public=public, revision=revision, create_pr=create_pr, unmeasured=unmeasured
    )
    if dry_run:
        return say_plan(request.describe(), as_json)
    quiet_hub()
    done = upload.push(request)
    if as_json:
        return say_json({**request.describe(), "url": done.url, "commit": done.commit, "new_commit": done.new_commit})
    if not done.new_commit:
        return say(f"{done.url} held all of it already, at commit {done.commit}; nothing was sent")
    say(f"{done.url} holds it at commit {done.commit}; every file arrived as it was sent")
    say(f"others get it with: excise pull {repo_id} --out DIR, or from_pretrained({repo_id!r})")


def pull(
    ref: Annotated[
        str, typer.Argument(metavar="OWNER/NAME[@REVISION]", help="Repository, and a branch, tag or commit.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    as_json: Json = False,
) -> None:
    """Download a model from the Hub and check every byte.

    Nothing that fails the check is left behind.
    """
    from ...artifacts import pull as download
    from ...artifacts.reporting.terminal import next_steps
    from . import shown

    quiet_hub()
    done = download.pull(ref, out)
    if as_json:
        about = ("commit", "files", "made_by_excise", "left_out")
        return say_json({"out": str(out), **{name: getattr(done, name) for name in about}})
    say("\n".join(shown.pulled(done, out)) + "\n")
    look = [f"excise card {out}"] if done.made_by_excise else []
    say(next_steps([*look, f"excise eval {out} --concept PACK", f"excise audit {out} --concept PACK --base MODEL"]))


def reproduce(
    what: Annotated[str, typer.Argument(help="A run's folder, a checkpoint, or a Hub id as OWNER/NAME[@REVISION].")],
    out: Annotated[Path, typer.Option(help="Folder to write the new run into.")],
    model: Annotated[str | None, typer.Option(help="Where the base is now, if it was a local model.")] = None,
    concept: Annotated[str | None, typer.Option(help="Where the concept pack is now, if it was a local one.")] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="KEY=PATH of another local file that was used, e.g. data=rows.jsonl.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Repeat a recorded run and compare the results.

    Weights are compared by SHA-256, or measurements where the platform differs.
    """
    from ...artifacts.checkpoints.manifest import checkpoint_of
    from ...artifacts.reporting.terminal import terminal_width
    from .. import reproduce as recipe
    from ..common.run_folder import refuse_taken
    from . import shown

    refuse_taken(out)
    settle()
    with ExitStack() as stack:
        if Path(what).is_dir():
            folder = checkpoint_of(Path(what))
        else:
            from ...artifacts import pull as download

            out.parent.mkdir(parents=True, exist_ok=True)
            # Beside the result, because a checkpoint may not fit into the system's temporary folder.
            folder = Path(stack.enter_context(TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-"))) / "published"
            download.pull(what, folder)
        prepared = recipe.prepare(folder, out, model=model, concept=concept, files=file or [])
        done = recipe.run(prepared, Events(watcher=watcher()))
    if as_json:
        about = ("identical", "holds", "changed_files", "outside", "compared", "differences")
        say_json({"out": str(done.out), **{name: getattr(done, name) for name in about}})
    else:
        say(shown.reproduction(done, terminal_width()))
    if not done.holds:
        raise SystemExit(1)


def build(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the world, its texts and both models.")] = 0,
    size: Annotated[
        Literal["full", "small"],
        typer.Option(
            help="full: 800 facts, like the built-in world. small: 512 facts, a smaller model, in a tenth of the time."
        ),
    ] = "full",
    reference: Annotated[
        bool, typer.Option(help="Also train a reference model on the same world without the forget domain.")
    ] = True,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps of the first training phase; with far fewer, the model does not learn the world."
        ),
    ] = None,
) -> None:
    """Build a small world of any seed.

    Writes a model that knows it, a reference model and concept packs. On two cores a model takes about 20 minutes, and a
    small one about two.
    """
    from dataclasses import replace

    from ...artifacts.reporting.terminal import next_steps
    from ..testbed.build import SIZES, build_testbed

    settle()
    settings = replace(SIZES[size], seed=seed, reference=reference)
    again = ["excise", "testbed", "build", "--out", str(out), "--seed", str(seed), "--size", size]
    if steps is not None:
        settings = replace(settings, steps=steps)
        again += ["--steps", str(steps)]
    with interruptible(out, again if reference else [*again, "--no-reference"]):
        build_testbed(settings, out, Events(watcher=watcher()))
    say(f"{out} is complete\n")
    say(next_steps([f"excise run orthogonalize --model {out}/testbed --concept {out}/concepts/declining"]))
