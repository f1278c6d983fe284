"""Commands about concept packs: new, make and get."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ...artifacts.events import Events
from ...artifacts.sources.source import MOST
from ...editing.errors import RequestError, nearest
from .flags import Json, say, say_json
from .session import quiet_hub, watcher


def new(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    kind: Annotated[
        str, typer.Option(help="knowledge (facts to forget), behaviour (what a model does) or task (what to train).")
    ] = "knowledge",
) -> None:
    """Write a concept pack of sample rows, to be replaced by yours.

    It loads and runs on the built-in model as it is. Comments in concept.yaml and a README.md explain each file.
    """
    from ...artifacts.reporting.terminal import next_steps
    from ..concept import scaffold

    if kind not in scaffold.SAMPLES:
        kinds = list(scaffold.SAMPLES)
        raise RequestError(f"--kind {kind!r} is none{nearest(kind, kinds)}; give one of {', '.join(kinds)}")
    scaffold.new(out, kind)
    say(f"{out} is complete; {out}/README.md says what each file holds\n")
    say(next_steps([shlex.join(["excise", "concept", "check", str(out)]), scaffold.first_run(out, kind)]))


def make(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    forget: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="What to forget: texts, or questions with answers or choices."),
    ] = None,
    retain: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="What must stay known, of any form.")
    ] = None,
    neighbour: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="The nearest topic that must stay known.")
    ] = None,
    questions: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Questions on what to forget, with answers or choices.")
    ] = None,
    retain_questions: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Questions on what must stay known.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Open prompts about the concept, to measure replies on.")
    ] = None,
    unseen: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Texts like those to forget that no model saw, for membership tests."),
    ] = None,
    positive: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Of a behaviour: prompts that bring it about.")
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Of a behaviour: prompts like those that do not.")
    ] = None,
    map_: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="FIELD=COLUMN,...",
            help="Names the columns of a source of unknown form, e.g. question=prompt,answer=solution; "
            "a+b joins columns, and retain:text=body is for --retain only.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the pack; the folder's where none is given.")] = None,
    description: Annotated[
        str | None, typer.Option(help="The concept in a few words, as it fits after `a text on`.")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="License of the data, which cards print.")] = None,
    keywords: Annotated[str | None, typer.Option(help="Words that show that a reply is about it, as a,b,c.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the subjects for group V, which no training sees.")] = 0.5,
    most: Annotated[int, typer.Option(min=1, help="Rows to draw of each source, at most.")] = MOST,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read everything and count, but write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make a concept pack of files, folders or data sets.

    A SOURCE is a .jsonl, .json, .csv, .tsv, .parquet, .txt (one text a line) or .md file (one document), a folder of
    documents, or hub:ORG/NAME[:CONFIGURATION][:SPLIT][@REVISION]; options for sources may be repeated. Columns of known
    data sets need no map. Long texts are cut into windows of about 200 words.
    """
    from ..concept.make import MakeRequest
    from ..concept.make import make as make_pack
    from .session import words

    given = {"forget": forget, "retain": retain, "neighbour": neighbour, "questions": questions,
             "retain-questions": retain_questions, "prompts": prompts, "unseen": unseen, "positive": positive,
             "negative": negative}  # fmt: skip
    request = MakeRequest(
        out,
        {role: tuple(refs) for role, refs in given.items() if refs},
        maps=tuple(map_ or ()),
        name=name,
        description=description,
        license=license_,
        keywords=tuple(words(keywords) or ()),
        held_out=held_out,
        most=most,
    )
    request.check()
    quiet_hub()
    _show(make_pack(request, Events(watcher=watcher()), dry_run=dry_run), as_json)


def _show(made: object, as_json: bool) -> None:
    from ...artifacts.reporting.terminal import next_steps
    from ..concept.pack import Made, next_commands, shown

    assert isinstance(made, Made)
    if as_json:
        return say_json(made.as_json())
    say(shown(made) + "\n")
    if made.written:
        say(f"{made.out} is complete\n")
        say(next_steps(next_commands(made)))
    else:
        say("nothing was written, because this was a dry run")


def get(
    name: Annotated[
        str, typer.Argument(help="wmdp:bio|cyber|chem, tofu:forget01|05|10, muse:news|books, or rwku:PERSON.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; named after the benchmark where none is given.")
    ] = None,
    without_gated: Annotated[
        bool, typer.Option("--without-gated", help="Leave out data sets that must be asked for: the texts of wmdp:bio.")
    ] = False,
    held_out: Annotated[
        float, typer.Option(help="Share of the subjects for group V, where the benchmark does not say.")
    ] = 0.5,
    most: Annotated[int, typer.Option(min=1, help="Rows to draw of each of its data sets, at most.")] = MOST,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read everything and count, but write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Make a concept pack of a published unlearning benchmark.

    Its data sets are read from the Hub, and their commits are recorded. Runs and evaluations on such a pack show the
    benchmark's own table.
    """
    from ..concept.benchmarks import folder_of
    from ..concept.benchmarks import get as get_pack
    from ..concept.make import check_held_out

    check_held_out(held_out)
    quiet_hub()
    folder = out or folder_of(name)
    events = Events(watcher=watcher())
    made = get_pack(name, folder, events, most=most, held_out=held_out, without_gated=without_gated, dry_run=dry_run)
    _show(made, as_json)
