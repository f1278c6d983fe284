"""What a command does before and after its work: quiet libraries, progress on stderr, settings, what to type next."""

import gc
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ...artifacts.events import Events, Watcher
from ...editing.errors import RequestError
from .failures import interruptible

Plan = dict[str, Any]


def tell(line: str) -> None:
    """What the program says of itself, apart from results."""
    sys.stderr.write(f"excise: {line}\n")


COLLECTED = gc.get_threshold()
"""How often Python looks for garbage by itself."""


def rarely_collect() -> None:
    """While libraries are imported, look for garbage rarely: modules are none, and it took a fifth of the time."""
    gc.set_threshold(100_000)


def settle() -> None:
    """Before a model: freed memory is used again, and libraries keep their own bars and notices off the terminal."""
    from ..common.memory import keep_freed_memory

    keep_freed_memory()
    # These are addressed to the libraries' own developers.
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.set_threshold(*COLLECTED)
    # What was imported lives as long as the process; each training and each model that goes would look through it again
    # for garbage, which takes longer than many a step.
    gc.freeze()


def quiet_hub() -> None:
    """The Hub's client shows its bars on a terminal only."""
    if not sys.stderr.isatty():
        # The variable for this is read while the client is imported, which may have happened by now.
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def watcher() -> Watcher:
    """Bars where stderr is a terminal, else plain lines."""
    from ...artifacts.progress import PlainLines, Terminal

    return Terminal() if sys.stderr.isatty() else PlainLines()


def carry_out(
    module: ModuleType,
    kind: Any,
    command: Sequence[str],
    *,
    config: Path | None,
    assignments: list[str],
    flags: dict[str, Any],
    resume: bool,
    dry_run: bool,
    run: Callable[[Any, Events, str], Any] | None = None,
    more: Sequence[str] = (),
) -> tuple[Any, Any]:
    """Run a recipe or an audit in its folder.

    Args:
        module: Has ``prepare``, ``describe`` and ``run``.
        kind: Class of its settings.
        command: The words that start it, without flags, e.g. ``["excise", "run", "elm"]``.
        run: In place of the module's; also given the command that goes on after an interrupt.
        more: Flags of that command beside ``--out`` and ``--resume``.

    Returns:
        The settings, and what ``run`` returned; of a dry run, the plan.
    """
    from ...artifacts.models.outline import outlines
    from ..common.ranks import processes, started_by
    from ..common.run_folder import RunSettings, free_folder, next_folder, resumed
    from ..common.settings import load_settings
    from ..common.team import shared_with_others

    settings = load_settings(kind, config, assignments, flags)
    assert isinstance(settings, RunSettings)
    if resume:
        if settings.out is not None and (settings.out / "checkpoint").exists():
            sys.stdout.write(f"{settings.out} is complete already; `excise verify {settings.out}` checks it\n")
            raise SystemExit(0)
        settings = resumed(settings, command[-1] if command[1] == "run" else command[1])
    settings = settings.completed()
    free = next_folder if dry_run else free_folder
    out = settings.out or free("audit" if command[1] == "audit" else command[-1])
    # The folder is set here, so that an interrupt can name it.
    settings = settings.model_copy(update={"out": out})
    # Only after the settings were checked: it imports transformers, and a mistake should be answered at once.
    settle()
    # Names and shapes are enough for a plan, and a Hub model's weights may be large.
    with outlines(dry_run):
        prepared = module.prepare(settings, resume=resume)
        if dry_run:
            return settings, _planned(module, prepared)
    whole = getattr(module, "trains_whole_weights", None)
    shared = whole is not None and whole(prepared)
    again = [*started_by(shared=shared), *command, "--out", str(out), "--resume", *more]
    events = Events(watcher=watcher())
    with interruptible(out, again), shared_with_others(shared, tell):
        if shared and processes() > 1:
            events.note(f"{processes()} processes share the training of whole weights")
        return settings, run(prepared, events, shlex.join(again)) if run else module.run(prepared, events)


def _planned(module: ModuleType, prepared: Any) -> Plan:
    """What a recipe would touch, and hold in memory where it says so."""
    plan: Plan = module.describe(prepared)
    if hasattr(module, "memory"):
        from ..common.memory_sizes import Unplanned

        try:
            plan["memory"] = module.memory(prepared).as_json()
        except Unplanned as error:
            plan["memory_not_planned"] = str(error)
    return plan


def integers(option: str, text: str) -> list[int]:
    """A list such as 3,17.

    Raises:
        RequestError: It is something else.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise RequestError(f"{option}: {text!r} is not a comma-separated list of integers, e.g. 3,17") from error


def prompts() -> Iterator[str]:
    """What the user types, until /quit or the end of input; without a terminal one prompt a line, which is shown
    again."""
    at_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if at_terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            if not at_terminal:
                sys.stdout.write(f"> {line.strip()}\n")
            yield line.strip()


def words(text: str | None) -> list[str] | None:
    """A comma-separated list of names; None where the flag was not used."""
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def after_run(settings: Any, results: dict[str, Any]) -> list[str]:
    """Commands that go on from a finished run, with its real paths."""
    from ...artifacts.reporting.outcomes import published_reference

    # Of a local base the checkpoint records only the name.
    base = [] if published_reference(results["base"]) else ["--base", settings.model]
    commands = [["excise", "chat", str(settings.out), *base]]
    if settings.budget == "quick":
        again = ["excise", "run", results["run"]["recipe"], "--model", settings.model, "--concept", settings.concept]
        commands.append([*again, "--budget", "standard", *_given(settings)])
    commands.append(_audit(str(settings.out), settings.concept, settings.model, settings.reference))
    commands.append(["excise", "push", str(settings.out), "OWNER/NAME", "--dry-run"])
    return [shlex.join(command) for command in commands]


def _given(settings: Any) -> list[str]:
    """Flags for what is neither the default nor the budget's."""
    from ..common.settings import as_flags

    usual = {key: field.default for key, field in type(settings).model_fields.items()} | settings.set_by(
        settings.budget
    )
    named = {"model", "concept", "out", "budget"}
    values = settings.model_dump(mode="json")
    chosen = {key: value for key, value in values.items() if key not in named and getattr(settings, key) != usual[key]}
    return as_flags(chosen)


def after_audit(settings: Any) -> list[str]:
    """Commands that go on from a finished audit."""
    commands = []
    if settings.budget == "quick":
        again = _audit(settings.model, settings.concept, settings.base, settings.reference)
        commands.append([*again, "--budget", "standard"])
    if settings.card:
        commands.append(["excise", "push", settings.model, "OWNER/NAME", "--dry-run"])
    return [shlex.join(command) for command in commands]


def _audit(model: str, concept: str, base: str, reference: str | None) -> list[str]:
    known = ["--reference", reference] if reference else []
    return ["excise", "audit", model, "--concept", concept, "--base", base, *known]
