"""What a sweep is asked for: one recipe, a grid of its settings, and seeds."""

import importlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...editing.errors import RequestError, nearest
from .. import RECIPES
from ..common.run_folder import RunSettings, next_folder
from ..common.settings import Settings, load_settings
from ..jobs.engines import Engine, parse_engine
from ..jobs.job import JOBS, Job

NAMED = ("model", "concept")
"""Settings that stand in the file by themselves."""
NOT_SWEPT = ("seed", "out")
LONGEST_NAME = 120


class SweepSettings(Settings):
    """What to run, and how often."""

    recipe: str = ""
    """Recipe to run, which must be given; excise list recipes shows all."""
    model: str | None = None
    """Model to edit; by default the recipe's."""
    concept: str | None = None
    """Concept pack to use; by default the recipe's."""
    set: dict[str, Any] = {}  # noqa: RUF012
    """Settings of the recipe. Each value of a list is run with each of the other lists; what is itself a list stands
    in one more."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)] = [0]  # noqa: RUF012
    """Seeds with which each combination is run. Intervals need two or more."""
    out: Path | None = None
    """Folder of the sweep, one folder a run inside. Default: runs/sweep-N, with the first free N."""
    jobs: str = "local:1"
    """Where runs go: local:N for N at once on this machine, or slurm[:key=value,...]."""


@dataclass(frozen=True)
class Combination:
    """Settings that are run with every seed."""

    name: str
    """What tells it from the others; empty if it is the only one."""
    values: Mapping[str, Any]
    """What was set, without model, concept and seed where these stand by themselves."""


@dataclass(frozen=True)
class SweepJob:
    """A checked request."""

    settings: SweepSettings
    combinations: tuple[Combination, ...]
    engine: Engine
    out: Path

    def run_of(self, combination: Combination, seed: int) -> Job:
        """The run of a combination with a seed."""
        name = f"{combination.name},seed={seed}" if combination.name else f"seed={seed}"
        words = ["run", self.settings.recipe]
        for key in NAMED:
            if (value := getattr(self.settings, key)) is not None:
                words += [f"--{key}", value]
        words += ["--seed", str(seed)]
        for assignment in _assignments(combination.values):
            words += ["--set", assignment]
        return Job(name, tuple(words), self.out / name)

    @property
    def runs(self) -> list[Job]:
        """Every run, one seed of all combinations after the other, so that each combination has a value early."""
        return [self.run_of(one, seed) for seed in self.settings.seeds for one in self.combinations]


def prepare(settings: SweepSettings, *, dry_run: bool = False) -> SweepJob:
    """Check every combination's settings, and what each model and pack needs, before any run starts.

    Raises:
        RequestError: Anything that could not work.
    """
    if settings.recipe not in RECIPES:
        wrong = (
            f"no recipe {settings.recipe!r}{nearest(settings.recipe, list(RECIPES))}" if settings.recipe else "missing"
        )
        raise RequestError(f"recipe: {wrong}; write recipe: NAME with one of {', '.join(RECIPES)}")
    if doubled := sorted({seed for seed in settings.seeds if settings.seeds.count(seed) > 1}):
        raise RequestError(f"seeds: {doubled[0]} stands twice; the same seed gives the same run")
    engine = parse_engine(settings.jobs)
    combinations = combinations_of(settings.set)
    out = settings.out or next_folder("sweep")
    if out.exists() and not (out / JOBS).is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} exists already and is no sweep; give another --out, or remove it first")
    job = SweepJob(settings, combinations, engine, out)
    checked = _checked(job)
    module = importlib.import_module(RECIPES[settings.recipe].module)
    # Files of models and packs are looked at once each.
    for one in {(run.model, run.concept): run for run in checked}.values():
        module.prepare(one.completed(), resume=True)
    return job


def describe(job: SweepJob) -> dict[str, Any]:
    """The runs, for a dry run."""
    return {
        "recipe": job.settings.recipe,
        "out": str(job.out),
        "engine": job.settings.jobs,
        "combinations": len(job.combinations),
        "seeds": job.settings.seeds,
        "runs": [{"name": run.name, "out": str(run.out), "command": ["excise", *run.command]} for run in job.runs],
    }


def combinations_of(grid: Mapping[str, Any]) -> tuple[Combination, ...]:
    """Every value of each list with every value of the others.

    Raises:
        RequestError: A list is empty, or holds a value twice.

    Example:
        >>> [one.name for one in combinations_of({"steps": [60, 120], "rank": 4})]
        ['steps=60', 'steps=120']
    """
    for key, value in grid.items():
        if key in NOT_SWEPT:
            raise RequestError(f"set: {key} is not set by a sweep; give {'seeds' if key == 'seed' else '--out'}")
        if value == [] or (isinstance(value, list) and any(one in value[:n] for n, one in enumerate(value))):
            raise RequestError(f"set: {key} holds {'no value' if not value else 'a value twice'}; give each value once")
    lists = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    varied = [key for key, values in lists.items() if len(values) > 1]
    made: list[Combination] = []
    names: set[str] = set()
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        name = _unique(",".join(f"{key}={_short(chosen[key])}" for key in varied), names)
        names.add(name)
        made.append(Combination(name, chosen))
    return tuple(made)


def _unique(name: str, taken: set[str]) -> str:
    name = name[:LONGEST_NAME]
    number = 2
    while (numbered := name if number == 2 and name not in taken else f"{name}-{number}") in taken:
        number += 1
    return numbered


def _short(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")[:40] or "empty"


def _assignments(values: Mapping[str, Any]) -> list[str]:
    # JSON is YAML, in which the command reads values.
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _checked(job: SweepJob) -> list[RunSettings]:
    """Settings of each combination.

    Raises:
        RequestError: Every mistake in any of them.
    """
    recipe = RECIPES[job.settings.recipe]
    kind = getattr(importlib.import_module(recipe.module), recipe.settings)
    flags = {key: getattr(job.settings, key) for key in NAMED}
    made: list[RunSettings] = []
    problems: list[str] = []
    for one in job.combinations:
        try:
            run = load_settings(kind, None, _assignments(one.values), {**flags, "seed": job.settings.seeds[0]})
            made.append(run)
        except RequestError as error:
            lines = str(error).splitlines()
            # Of several, the first line counts them.
            problems += lines[1:] or lines
    _raise_all(problems)
    return made


def _raise_all(problems: Sequence[str]) -> None:
    different = list(dict.fromkeys(line.strip().replace("--set ", "set: ") for line in problems))
    if different:
        raise RequestError("\n  ".join(different))
