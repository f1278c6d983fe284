"""What a search is asked for, checked before a weight is read, and its record in the search's folder."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ...artifacts.files.forms import Form, validated
from ...artifacts.files.opened import Telling, Unreadable
from ...artifacts.files.written import read_sealed, write_sealed
from ...editing.errors import RequestError, nearest
from .. import RECIPES
from ..common.measured_job import Job, MeasuredSettings
from ..common.run_inputs import checksums
from ..common.search_space import Dimension, ReadySpace, Space, is_searched, read_dimension
from ..common.settings import load_settings
from .figures import guard, objective
from .study import file_in, without_password
from .trial import Rules

RECORD = "search.json"
SCHEMA_VERSION = 1
NOT_SEARCHED = ("model", "concept", "out", "items", "seed", "device", "dtype")


@dataclass(frozen=True)
class Request:
    """A checked search."""

    recipe: str
    module: ModuleType
    base: MeasuredSettings
    """Settings that all trials share."""
    space: Space
    to_settings: Callable[[Mapping[str, Any], int], dict[str, Any]]
    rules: Rules
    folder: Path
    storage: str
    trials: int
    prompts: int
    first: tuple[Mapping[str, Any], ...]
    """Values of the first trials, where the recipe's own space is searched."""
    left_out: tuple[str, ...]
    """Settings that trials alone have: what they turn off is of the report."""
    job: Job
    """The shared request, measured on the half that chooses."""

    @property
    def layers(self) -> int:
        return self.job.layers

    def settings_of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a trial with these values of the space."""
        return self.to_settings(values, self.layers)

    def job_with(self, settings: Mapping[str, Any], folder: Path) -> Any:
        """What the recipe prepares for a trial; checks it as a run of its own would be."""
        shared = self.base.model_dump(exclude_unset=True) | {"out": folder, "items": "search"}
        chosen = load_settings(type(self.base), None, [], {**shared, **settings})
        chosen.check_searchable()
        return self.module.prepare(chosen, resume=False)


class _Record(Form):
    schema_version: int
    recipe: str
    settings: dict[str, Any]
    space: dict[str, dict[str, Any]]
    ready: bool
    objectives: list[str]
    guards: list[str]
    prompts: int
    storage: str | None
    inputs: dict[str, str]


def prepare(
    recipe: str,
    folder: Path,
    *,
    config: Path | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    objectives: Sequence[str] = (),
    guards: Sequence[str] = (),
    storage: str | None = None,
    trials: int = 50,
    prompts: int = 64,
    write: bool = True,
) -> Request:
    """Check names, ranges, objectives and the shared request, before a weight is read.

    Args:
        write: Write the record into ``folder``, or compare with the one that is there.

    Raises:
        RequestError: Anything that could not work, or a search in ``folder`` that was begun otherwise.
    """
    check_optuna()
    if recipe not in RECIPES:
        raise RequestError(f"no recipe {recipe!r}{nearest(recipe, list(RECIPES))}; recipes: {', '.join(RECIPES)}")
    if trials < 1 or prompts < 1:
        raise RequestError(f"--trials {trials} --prompts {prompts}: both must be at least 1")
    module = importlib.import_module(RECIPES[recipe].module)
    if not hasattr(module, "learn"):
        raise RequestError(f"the recipe {recipe} cannot be searched: its module has no function learn")
    ready = _ready(recipe)
    base, searched = _settings(getattr(module, RECIPES[recipe].settings), config, assignments, flags or {})
    space, to_settings = _space(recipe, searched, ready)
    given = base.model_dump(mode="json", exclude_unset=True, exclude={"out", "items"})
    fixed = {key: value for key, value in (ready.fixed if ready else {}).items() if key not in base.model_fields_set}
    changes: dict[str, Any] = {**fixed, "items": "search", "out": folder / "trials" / "0"}
    base = load_settings(type(base), None, [], base.model_dump(exclude_unset=True) | changes)
    base.check_searchable()
    job = measured_job_of(module.prepare(base, resume=False))
    rules = Rules(
        tuple(map(objective, tuple(objectives) or _usual_objectives(recipe, ready, job))), tuple(map(guard, guards))
    )
    left_out = tuple(key for key, value in fixed.items() if value in (False, 0))
    request = Request(
        recipe,
        module,
        base,
        space,
        to_settings,
        rules,
        folder,
        storage or file_in(folder),
        trials,
        prompts,
        () if searched or ready is None else ready.first,
        left_out,
        job,
    )
    _check_values(request)
    if write:
        _check_or_write(request, given, ready=not searched, storage=storage)
    return request


def _settings(
    kind: Any, config: Path | None, assignments: Sequence[str], flags: Mapping[str, Any]
) -> tuple[MeasuredSettings, dict[str, Dimension]]:
    """Settings that all trials share, and what is varied where somebody says so."""
    searched: dict[str, Dimension] = {}

    def aside(key: str, value: Any, place: str) -> bool:
        if not is_searched(value):
            return False
        if key not in kind.model_fields or key in NOT_SEARCHED:
            raise RequestError(
                f"{place}: {key!r} is no setting that can be searched{nearest(key, sorted(kind.model_fields))}"
            )
        searched[key] = read_dimension(value, place)
        return True

    return load_settings(kind, config, list(assignments), dict(flags), aside), searched


def _space(
    recipe: str, searched: dict[str, Dimension], ready: ReadySpace | None
) -> tuple[Space, Callable[[Mapping[str, Any], int], dict[str, Any]]]:
    if searched:
        return searched, lambda values, _: dict(values)
    if ready is None:
        raise RequestError(
            f"{recipe} has no search space of its own; name what to vary, e.g. --set 'learning_rate={{search: [1e-4,"
            " 1e-2], log: true}'"
        )
    return ready.space, ready.to_settings


def _usual_objectives(recipe: str, ready: ReadySpace | None, job: Job) -> tuple[str, ...]:
    kind = job.concept.about.kind
    names = (ready.objectives if ready else {}).get(kind, ())
    if not names:
        raise RequestError(
            f"{recipe} has no objective of its own for a concept of kind {kind}; give --objective FIGURE:min or FIGURE:max"
        )
    return names


def check_optuna() -> None:
    """Raise unless Optuna is installed.

    Raises:
        RequestError: It is not.
    """
    if importlib.util.find_spec("optuna") is None:
        raise RequestError("excise search needs the package optuna; run: pip install 'excise[search]'")


def recorded(folder: Path, storage: str | None = None, trials: int = 50) -> Request:
    """The search of a folder, for its workers and for picking a trial.

    Raises:
        RequestError: There is none, or its record or inputs were changed.
    """
    record = read_record(folder)
    url = storage or record["storage"]
    if url is None:
        raise RequestError(f"the search in {folder} keeps its trials in a database with a password; give --storage URL")
    flags = {
        key: value for key, value in record["settings"].items() if value is not None and key not in ("out", "items")
    }
    given = [] if record["ready"] else [f"{name}={one}" for name, one in _as_yaml(record["space"]).items()]
    return prepare(
        record["recipe"],
        folder,
        assignments=given,
        flags=flags,
        objectives=record["objectives"],
        guards=record["guards"],
        storage=None if url == file_in(folder) else url,
        trials=trials,
        prompts=record["prompts"],
    )


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a search.

    Raises:
        RequestError: There is none, or it is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        raise RequestError(f"{folder} holds no search; give the --out of an `excise search`")
    with Telling(RequestError, f"the search cannot go on; remove {folder} and start it again").about(f"{path}"):
        record = read_sealed(path)
        validated(_Record, record)
        _check_parts(record)
    if record["schema_version"] != SCHEMA_VERSION:
        raise RequestError(f"the search in {folder} was begun by another version of excise; give another --out")
    return record


def _check_parts(record: Mapping[str, Any]) -> None:
    """Check what a record says of ranges, objectives and guards.

    Raises:
        Unreadable: A part is none of that.
    """
    try:
        for name, one in record["space"].items():
            _ = read_dimension(one, f"space.{name}")
        for text in record["objectives"]:
            _ = objective(text)
        for text in record["guards"]:
            _ = guard(text)
    except RequestError as error:
        raise Unreadable(str(error)) from error


def _as_yaml(space: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    import json

    # JSON is YAML too.
    return {name: json.dumps(one) for name, one in space.items()}


def _ready(recipe: str) -> ReadySpace | None:
    path = RECIPES[recipe].space
    if not path:
        return None
    module, _, name = path.partition(":")
    ready: ReadySpace = getattr(importlib.import_module(module), name)
    return ready


def measured_job_of(prepared: Any) -> Job:
    """The measured part of whatever a recipe prepares."""
    for one in (prepared, getattr(prepared, "run", None), getattr(prepared, "adapter", None)):
        if isinstance(one, Job):
            return one
        if isinstance(inner := getattr(one, "run", None), Job):
            return inner
    raise RequestError("the recipe prepares no measured run, so it cannot be searched")


def _check_values(request: Request) -> None:
    """Try both ends of every range: what no recipe takes is said now, not after an hour."""
    for end in (0, -1):
        values = {
            name: one.choices[end] if one.choices else (one.low, one.high)[end] for name, one in request.space.items()
        }
        request.job_with(request.settings_of(values), request.folder / "trials" / "0")


def _check_or_write(request: Request, given: dict[str, Any], *, ready: bool, storage: str | None) -> None:
    folder, record = request.folder, request.folder / RECORD
    job = request.job
    content = {
        "schema_version": SCHEMA_VERSION,
        "recipe": request.recipe,
        "settings": given,
        "space": {name: one.as_json() for name, one in request.space.items()},
        "ready": ready,
        "objectives": [one.name for one in request.rules.objectives],
        "guards": [one.name for one in request.rules.guards],
        "prompts": request.prompts,
        # A password is written nowhere.
        "storage": request.storage if storage is None or storage == without_password(storage) else None,
        "inputs": checksums(job.settings, {"the base": job.source}, job.concept),
    }
    if not record.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RequestError(f"{folder} exists and holds no search; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        return write_sealed(record, content)
    before = read_record(folder)
    different = sorted(key for key in content if key != "storage" and before.get(key) != content[key])
    if different:
        raise RequestError(
            f"the search in {folder} was begun with other {', '.join(different)}; give the same again, or another --out"
        )
    return None
