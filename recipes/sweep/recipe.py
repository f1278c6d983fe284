"""A sweep: one recipe with every combination of some settings and several seeds, each an ordinary run."""

import json
from dataclasses import dataclass
from typing import Any

from ...artifacts.files.written import write_whole
from ..jobs.job import Outcome
from ..jobs.run import run_jobs
from .request import SweepJob, SweepSettings, describe, prepare
from .table import Line, as_json, lines_of

__all__ = ["Sweep", "SweepJob", "SweepSettings", "describe", "prepare", "run"]
RESULTS = "results.json"


@dataclass(frozen=True)
class Sweep:
    """A sweep whose runs have all ended."""

    job: SweepJob
    outcomes: list[Outcome]
    lines: list[Line]
    base: dict[str, float]
    """Values of the model that was edited, where all runs share it."""

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failed]

    def as_json(self) -> dict[str, Any]:
        """The content of ``results.json``."""
        return as_json(self.job, self.lines, self.base)


def run(job: SweepJob, again: str) -> Sweep:
    """Run what is not finished yet, and write ``results.json`` with the figures of all.

    Args:
        again: The command that goes on after an interrupt.

    Raises:
        ExciseError: Interrupted; or SLURM took no job. A run that fails raises nothing and is counted.
    """
    outcomes = run_jobs(job.runs, job.engine, job.out, again=again)
    sweep = Sweep(job, outcomes, *lines_of(job, outcomes))
    write_whole(job.out / RESULTS, json.dumps(sweep.as_json(), indent=1) + "\n")
    return sweep
