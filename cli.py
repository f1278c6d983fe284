"""The command line: one row a command, and every error as one line. Commands import what is heavy when they need it."""

import os
import signal
import sys
import threading
from typing import Annotated, Any

import typer

from . import __version__
from .artifacts.events import waited_for
from .recipes.commands import concept, edit, jobs, look, measure, packs, publish, search
from .recipes.commands.failures import INTERRUPTED, explained
from .recipes.commands.flags import say
from .recipes.commands.help import PanelGroup, SettingsCommand
from .recipes.commands.session import rarely_collect, settle, tell, watcher
from .recipes.common.ranks import LAUNCH, launch_of, work_alone

app = typer.Typer(
    cls=PanelGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Edit a language model's weights, measure what the edit did, and ship the result.",
    epilog="Errors are one line; add --debug to any command for the traceback. Exit codes: 0 done, 1 the run failed, "
    "2 the request was wrong, 130 interrupted.",
)
testbed_app = typer.Typer(cls=PanelGroup, help="Make small worlds whose every fact is known.")
app.add_typer(testbed_app, name="testbed", rich_help_panel="Testbed")
concept_app = typer.Typer(cls=PanelGroup, help="Make concept packs, which say what to edit and how to measure it.")
app.add_typer(concept_app, name="concept", rich_help_panel="Edit")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"excise {__version__}")
        raise SystemExit(0)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Flags of the program itself; what takes long before a run's first stage is shown too."""
    context.with_resource(waited_for(watcher))


HUB_EXAMPLE = "excise run orthogonalize --model HuggingFaceTB/SmolLM2-135M-Instruct --concept my-concept/"
COMMANDS: dict[str, tuple[str, Any, str]] = {
    "run": ("Edit", edit.run, f"`excise run RECIPE --help` also shows the recipe's settings.\nExample: {HUB_EXAMPLE}"),
    "apply": ("Edit", edit.apply, "Example: excise apply runs/elm-1 --base meta-llama/Llama-3.1-8B --out edited"),
    "search": ("Edit", search.search,
        "Example: excise search orthogonalize --trials 60 --objective behaviour:min --objective kl.replies:min --out found"),
    "pick": ("Edit", search.pick, "Example: excise pick found 12 --out runs/picked"),
    "sweep": ("Edit", jobs.sweep, "Example: excise sweep sweep.yaml --out runs/sweep-1 --jobs local:2"),
    "eval": ("Measure", measure.evaluate,
        "Example: excise eval runs/elm-1 runs/rmu-1 --base builtin:testbed --concept builtin:potions"),
    "audit": ("Measure", measure.audit,
        "Example: excise audit runs/elm-1 --concept builtin:potions --base builtin:testbed"),
    "meta": ("Measure", measure.meta,
        "Example: excise meta --knows A --knows B --never C --never D --edited runs/elm-1 --concept builtin:potions"),
    "compare": ("Measure", measure.compare, "Example: excise compare runs/elm-1 runs/rmu-1 --out runs/both"),
    "list": ("Look", look.list_, "Example: excise list elm"),
    "chat": ("Look", look.chat, "Example: excise chat runs/elm-1"),
    "watch": ("Look", jobs.watch, "Example: excise watch runs/sweep-1"),
    "card": ("Look", look.card, "Example: excise card runs/elm-1"),
    "report": ("Look", look.report, "Example: excise report pulled/my-model --out my-model.html"),
    "diff": ("Look", look.diff, "Example: excise diff builtin:testbed runs/elm-1"),
    "inspect": ("Look", look.inspect,
        "Example: excise inspect runs/caft-1 --model builtin:testbed --concept builtin:shortcut"),
    "localize": ("Look", look.localize, "Example: excise localize builtin:testbed --concept builtin:potions"),
    "architecture": ("Look", look.architecture, "Example: excise architecture Qwen/Qwen3-8B, or a folder with a config.json"),
    "ui": ("Look", look.ui, "Example: excise ui runs, then open the address that it prints"),
    "verify": ("Publish", publish.verify, "Example: excise verify runs/elm-1"),
    "sign": ("Publish", publish.sign,
        "Example: excise sign runs/elm-1 --key key.pem, then excise verify runs/elm-1 --key public.pem"),
    "push": ("Publish", publish.push, "Example: excise push runs/elm-1 my-name/my-model --dry-run"),
    "pull": ("Publish", publish.pull, "Example: excise pull someone/model@main --out model"),
    "reproduce": ("Publish", publish.reproduce, "Example: excise reproduce runs/elm-1 --out runs/again"),
}  # fmt: skip
"""Panel, function and the end of its help page."""
CONCEPT_COMMANDS: dict[str, tuple[Any, str]] = {
    "new": (concept.new, "Example: excise concept new my-pack --kind behaviour"),
    "make": (concept.make, "Example: excise concept make my-pack --forget mine.txt --retain general.txt"),
    "get": (concept.get, "Example: excise concept get tofu:forget10"),
    "check": (packs.check, "Example: excise concept check my-pack --model meta-llama/Llama-3.1-8B"),
    "show": (packs.show, "Example: excise concept show builtin:potions --rows 1"),
}
"""Function and the end of its help page."""

for name, (panel, function, epilog) in COMMANDS.items():
    kind = SettingsCommand if name in ("run", "eval", "audit", "search", "sweep") else None
    app.command(name, cls=kind, rich_help_panel=panel, epilog=epilog)(function)
for name, (function, epilog) in CONCEPT_COMMANDS.items():
    concept_app.command(name, rich_help_panel="Edit", epilog=epilog)(function)
testbed_app.command("build", rich_help_panel="Testbed", epilog="Example: excise testbed build --out my-world --seed 7")(
    publish.build
)


LIBRARIES = {
    # How often a thread looks for work before it sleeps. GNU OpenMP's own 300,000 keep a core from whoever else needs
    # it, such as another thread of this process: beside other work a step took many times as long
    # (``docs/measured.md``).
    "GOMP_SPINCOUNT": "2000",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Otherwise the tokenizers library warns whenever a process is forked.
    "TOKENIZERS_PARALLELISM": "false",
}
"""What libraries read while they are imported; a user's own settings stand."""


def main() -> None:
    """Entry point: turns every error into one line and an exit code."""
    for variable, value in LIBRARIES.items():
        os.environ.setdefault(variable, value)
    rarely_collect()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    _divide(arguments)
    # Not by way of SIGINT, which a shell's background jobs ignore.
    signal.signal(signal.SIGTERM, _stop)
    sys.unraisablehook = _interrupt_again
    try:
        code = app(args=arguments, prog_name="excise", standalone_mode=False)
        if code == INTERRUPTED:
            # The parser swallows an interrupt and returns its code.
            raise KeyboardInterrupt
    except BaseException as error:
        if debug:
            raise
        line, code = explained(error, arguments)
        if line:
            tell(line)
        # An interrupt within code that was compiled from a text, as libraries do while they are imported, leaves a mark in
        # the interpreter, which would end the process by the signal and not by the code; running any text clears it.
        exec("")
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _divide(arguments: list[str]) -> None:
    """Of several processes that a launcher started, one goes on; the others help it or stop here."""
    launch = launch_of(os.environ, arguments)
    if launch is None:
        works, sentence = work_alone(os.environ)
        if sentence:
            tell(sentence)
        if not works:
            sys.exit(0)
    elif launch.rank:
        from .recipes.common.team import follow

        settle()
        sys.exit(follow(launch, tell))
    LAUNCH.set(launch)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _interrupt_again(ignored: Any) -> None:
    """Python ignores what is raised while an object is destroyed; an interrupt that came just then is sent once more."""
    if issubclass(ignored.exc_type, KeyboardInterrupt):
        # From another thread, once this call, which is within the destructor, has returned.
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(ignored)


if __name__ == "__main__":
    main()
