"""Settings that every run has, and the folder that it writes: where it goes, and what an unfinished run holds."""

import atexit
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError

from ...artifacts.checkpoints.staging import refuse_existing
from ...artifacts.files.forms import Form, validated
from ...artifacts.files.locks import Lock
from ...artifacts.files.opened import Telling
from ...artifacts.files.written import read_sealed, write_sealed
from ...editing.errors import RequestError
from .prompt_settings import PromptSettings

T = TypeVar("T", bound="RunSettings")
WORK = ".work"
STARTED = "settings.json"
"""In the working folder: recipe, settings and checksums of the inputs that the run was begun with."""
SCHEMA_VERSION = 2
PLACES = ("model", "concept", "reference", "base", "out")
"""Settings that name where models, the pack and the run are: they may move, and checksums tell whether they changed."""


LOCK = "lock"
"""In the working folder: locked by the process that writes it."""
_RESERVED: set[Path] = set()
"""Folders that this process has made to be the first in them."""
_HELD: dict[Path, Lock] = {}
"""Working folders that this process writes."""


class RunSettings(PromptSettings):
    """Settings that every recipe has."""

    model: str = "builtin:testbed"
    """Model to edit: builtin:NAME, a Hub id (revision after @), a folder, or a .gguf file."""
    concept: str = "builtin:declining"
    """Concept pack to use: builtin:NAME or a folder."""
    out: Path | None = None
    """Folder to write the run to. Default: runs/RECIPE-N, with the first free N."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seed of every random choice. The same seed gives the same checkpoint on the same machine."""
    device: str = "auto"
    """Where to compute: cpu, cuda, cuda:N or mps. auto takes the GPU if there is one, and all if the model needs them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type to compute in. auto takes bfloat16 where the hardware multiplies it faster,
    else float16 on a CUDA GPU and float32 elsewhere."""

    def completed(self) -> Self:
        """The same, with what the model's own record says where nothing was set.

        Raises:
            RequestError: The record is of no help, and there is no default.
        """
        return self

    def check_searchable(self) -> None:
        """Raise unless a search can try these settings.

        Raises:
            RequestError: What a search turns would not be the whole edit.
        """

    def published(self, *left_out: str) -> dict[str, Any]:
        """Settings as they may be published: of a local path the last part."""
        plain = self.model_dump(mode="json", exclude=set(left_out))
        local = {key for key in plain if isinstance(getattr(self, key), Path) or _is_local(plain[key])}
        return {key: Path(value).name if key in local else value for key, value in plain.items()}


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and Path(value).exists()


def next_folder(recipe: str) -> Path:
    """``runs/RECIPE-N`` for the first N that is free, which another process may take meanwhile."""
    number = 1
    while Path(f"runs/{recipe}-{number}").exists():
        number += 1
    return Path(f"runs/{recipe}-{number}")


def free_folder(recipe: str) -> Path:
    """``runs/RECIPE-N`` for the first N that is free, made at once, so that no two processes take the same.

    It is removed when this process ends, if nothing was written into it.
    """
    Path("runs").mkdir(exist_ok=True)
    while True:
        out = next_folder(recipe)
        with suppress(FileExistsError):
            out.mkdir()
            _RESERVED.add(out.absolute())
            atexit.register(_remove_empty, out.absolute())
            return out


def _remove_empty(out: Path) -> None:
    for folder in (out, out.parent):
        # A folder that holds anything cannot be removed like this.
        with suppress(OSError):
            folder.rmdir()


def refuse_taken(out: Path) -> None:
    """Raise unless ``out`` is free; an unfinished run there can be resumed."""
    if out.absolute() in _RESERVED and not any(out.iterdir()):
        return
    if (out / WORK).is_dir():
        raise RequestError(f"{out} holds an unfinished run; add --resume to go on with it, or give another --out")
    refuse_existing(out)


def start_folder(
    out: Path, recipe: str, settings: RunSettings, inputs: Mapping[str, str], *, alone: bool = True
) -> Path:
    """Make a run's folder and return its working folder; go on with an unfinished run of the same request there.

    Args:
        inputs: Checksums of what the run reads, by what a message may call it, such as "the base".
        alone: Lock the folder; otherwise this process works beside the one that holds it.

    Raises:
        RequestError: Another process is writing it; or the unfinished run there is of another recipe, has other settings, or read other inputs.
    """
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    if alone:
        _hold(out)
    request = {"recipe": recipe, "settings": settings.model_dump(mode="json"), "inputs": {**inputs}}
    if (work / STARTED).exists():
        _check_same(out, _started(out), request)
    else:
        write_sealed(work / STARTED, {"schema_version": SCHEMA_VERSION, **request})
    return work


def _hold(out: Path) -> None:
    """Lock a run's folder until this process ends, or lets go of all of them.

    Raises:
        RequestError: Another process is writing it.
    """
    path = (out / WORK / LOCK).absolute()
    # This process may go on with what it began before.
    if (before := _HELD.pop(path, None)) is not None:
        before.release()
    lock = Lock.take(path)
    if lock is None:
        raise RequestError(
            f"another process is writing {out}; follow it with excise watch {out}, or give another --out"
        )
    _HELD[path] = lock


@contextmanager
def letting_go() -> Iterator[None]:
    """Afterwards no run's folder is locked by this process any more, so that others may go on with what is unfinished."""
    try:
        yield
    finally:
        while _HELD:
            _HELD.popitem()[1].release()


def resumed(settings: T, recipe: str) -> T:
    """The settings of the unfinished run in ``settings.out``; those that were set now must agree with them.

    Raises:
        RequestError: There is no unfinished run of the recipe there, it has other settings, or its record is damaged.
    """
    if settings.out is None:
        raise RequestError("--resume needs the folder of the run to go on with; give --out")
    if not (settings.out / WORK).is_dir():
        raise RequestError(f"{settings.out} holds no unfinished run; leave out --resume to start one")
    started = _started(settings.out)
    _check_recipe(settings.out, started, recipe)
    try:
        stored = type(settings).model_validate(started["settings"])
    except ValidationError as error:
        raise RequestError(
            f"the run in {settings.out} was begun by another version of excise, with other settings; remove the folder"
            " and start the run again"
        ) from error
    # Only what was set now is compared; what was left out is taken from the stored settings.
    set_now = settings.model_fields_set
    different = [key for key in set_now - {*PLACES} if getattr(settings, key) != getattr(stored, key)]
    if different:
        raise RequestError(
            f"the run in {settings.out} was started with other values of {', '.join(sorted(different))}; "
            "leave them out, or start a new run"
        )
    return stored.model_copy(update={key: getattr(settings, key) for key in PLACES if key in set_now})


class _Started(Form):
    schema_version: int
    recipe: str
    settings: dict[str, Any]
    inputs: dict[str, str]


def _started(out: Path) -> dict[str, Any]:
    again = Telling(RequestError, f"the run cannot go on; remove {out} and start it again")
    with again.about(f"{out / WORK / STARTED}"):
        started = read_sealed(out / WORK / STARTED)
        validated(_Started, started)
    if started.get("schema_version") != SCHEMA_VERSION:
        raise RequestError(f"the run in {out} was begun by another version of excise; remove {out} and start it again")
    return started


def _check_recipe(out: Path, started: dict[str, Any], recipe: str) -> None:
    if started["recipe"] != recipe:
        raise RequestError(
            f"the unfinished run in {out} is of {started['recipe']}, not of {recipe}; go on with {started['recipe']},"
            " or give another --out"
        )


def _check_same(out: Path, started: dict[str, Any], request: dict[str, Any]) -> None:
    _check_recipe(out, started, request["recipe"])
    for part, what in (("settings", "settings"), ("inputs", "inputs")):
        before, now = started[part], request[part]
        keys = (before.keys() | now.keys()) - {*(PLACES if part == "settings" else ())}
        different = sorted(key for key in keys if before.get(key) != now.get(key))
        if different:
            raise RequestError(
                f"the run in {out} was begun with other {what}: {', '.join(different)} changed since; put them back, or"
                " start a new run with another --out"
            )
