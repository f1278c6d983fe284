"""Every error as one line and an exit code: what is wrong, and what to type instead."""

import errno
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...editing.errors import ExciseError
from .. import RECIPES

INTERRUPTED = 130


class Interrupted(ExciseError):
    """The user stopped the command."""

    exit_code = INTERRUPTED


@contextmanager
def interruptible(out: Path, command: Sequence[str]) -> Iterator[None]:
    """Say on an interrupt how to continue, if the work in ``out`` can be continued.

    Args:
        command: What continues it, e.g. ``["excise", "run", "elm", "--out", "runs/elm-1", "--resume"]``.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        resumable = (out / ".work" / "settings.json").is_file() or out.with_name(f".{out.name}.staging").is_dir()
        how = f"Continue with: {shlex.join(command)}" if resumable else "Nothing was written, so start it again"
        raise Interrupted(f"interrupted; no partial checkpoint was left. {how}") from error


def explained(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """The line to print, empty if there is nothing to say, and the exit code."""
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 0
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return "interrupted; nothing was written", INTERRUPTED
    if isinstance(error, ExciseError):
        return str(error), error.exit_code
    if hasattr(error, "option_name") and hasattr(error, "possibilities"):
        return _unknown_option(error, arguments), 2
    if hasattr(error, "format_message"):
        return f"{error.format_message().rstrip('.').replace('Value error, ', '')}; see `{_help_of(error)}`", 2
    if _disk_is_full(error):
        how = "Free some space, then run the command again with --resume"
        return f"the disk is full; no partial checkpoint was left. {how}", 1
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'no file named'}); check the path and its permissions", 1
    if _memory_ran_out(error):
        return (
            "memory ran out; no partial checkpoint was left. Use --dtype bfloat16, smaller settings (--dry-run shows what takes"
            " memory), or a device with more memory; then run the command again with --resume",
            1,
        )
    words = " ".join(str(error).split())[:300]
    return f"unexpected {type(error).__name__}: {words}; run again with --debug and report it", 1


def _memory_ran_out(error: BaseException) -> bool:
    """Whether it is about memory, without importing PyTorch where nothing else has."""
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return False
    from ...editing.numerics.out_of_memory import memory_ran_out

    return memory_ran_out(error)


def _disk_is_full(error: BaseException) -> bool:
    """Whether it is about a full disk, in the words of whichever library was writing."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors tells what the system said; PyTorch's writer only that it is not where it should be in the file.
    signs = ("No space left on device", "Disk quota exceeded", "inline_container.cc")
    return any(sign in str(error) for sign in signs)


def _unknown_option(error: Any, arguments: Sequence[str]) -> str:
    """An option that is a setting, or that has another name today, is answered with what to type."""
    from .help import COMMAND_SETTINGS, settings_of

    option = str(error.option_name)
    key = option.lstrip("-").removeprefix("no-").replace("-", "_")
    # Here and not above: it brings pydantic, which a command that works has no use for.
    from ...artifacts.upgrade import RENAMED_SETTINGS

    name = RENAMED_SETTINGS.get(key, key)
    flag = ("--no-" if option.startswith("--no-") else "--") + name.replace("_", "-")
    command = error.ctx.command if error.ctx else None
    flags = [word for param in getattr(command, "params", []) for word in (*param.opts, *param.secondary_opts)]
    if flag != option and flag in flags:
        return f"{option} is now called {flag}"
    recipe = next((word for word in arguments if word in RECIPES), None)
    owner = recipe if command is not None and command.name == "run" else getattr(command, "name", None)
    known = settings_of(str(owner)) if owner in RECIPES or owner in COMMAND_SETTINGS else []
    if any(setting.name == name for setting in known) and flag not in flags:
        return f"{option} is a setting: use --set {name}={_value_of(option, arguments)}"
    return f"{error.format_message().rstrip('.')}; see `{_help_of(error)}`"


def _value_of(option: str, arguments: Sequence[str]) -> str:
    for place, word in enumerate(arguments):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and place + 1 < len(arguments) and not arguments[place + 1].startswith("--"):
            return arguments[place + 1]
    return "VALUE"


def _help_of(error: Any) -> str:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "excise"
    return f"{path} --help"
