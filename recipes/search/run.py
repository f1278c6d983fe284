"""The loop of a search: ask, try, tell, until enough trials ended; and a worker that joins one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...artifacts.events import Events
from ...editing.edits.base import WeightEdit
from ...editing.errors import RequestError
from ..common import measured_run
from .bench import Bench
from .page import write_page
from .request import Request, measured_job_of
from .results import SearchResults, results_of
from .study import Done, Study, trial_folder
from .trial import tried

FAILED_AT_ONCE = 5
"""Trials that end a search where all failed."""
Told = Callable[[Sequence[Done], Sequence[Done]], None]
"""Called with all trials that ended, and those of the front."""


def describe(request: Request) -> dict[str, Any]:
    """What a search would do."""
    job = request.job
    return {
        "recipe": request.recipe,
        "out": str(request.folder),
        "base": job.source.describe(),
        "concept": job.concept.ref,
        "trials": request.trials,
        "space": {name: one.in_words() for name, one in request.space.items()},
        "objectives": [one.name for one in request.rules.objectives],
        "guards": [one.name for one in request.rules.guards],
        "items": "the half search chooses; the half report is for what is picked",
        "device": str(job.device),
        "dtype": job.dtype_name,
    }


def run(request: Request, events: Events, told: Told = lambda *_: None) -> SearchResults:
    """Search until as many trials ended as were asked for; those that ended before count.

    Raises:
        RequestError: The storage cannot be opened, or a trial's settings cannot work.
    """
    study = Study.of(request)
    with study.at_work():
        study.redo_what_was_killed()
        if len(study.done()) < request.trials:
            _searched(request, study, events, told)
    done = study.done()
    results = results_of(request, done, study.front(done))
    write_page(request, done, study.front(done))
    return results


def _searched(request: Request, study: Study, events: Events, told: Told) -> None:
    """Try one edit after the other, on a base that is loaded and measured once."""
    loaded = measured_run.load(request.job, request.job.source, "base", events)
    with events.stage("measure base on the half that chooses"):
        bench = Bench(request.job, loaded, request.prompts)
        rules = request.rules
        cheap = [one.figure for one in (*rules.stand_ins, *rules.objectives)]
        bench.measure_base(rules.figures)
        base = {one.name: bench.base["all"].value(one) for one in cheap if one.measurement != "kl_from_base"}
    events.write("base", 0, {**base, "generated_tokens": bench.base["all"].generated})
    done = study.done()
    while len(done) + study.running() < request.trials:
        _one(request, study, bench, done)
        done = study.done()
        _check_some_work(done)
        told(done, study.front(done))
        write_page(request, done, study.front(done))


def _one(request: Request, study: Study, bench: Bench, before: Sequence[Done]) -> None:
    asked = study.ask(request.trials)
    if asked is None:
        return
    trial, values = asked
    settings = request.settings_of(values)
    folder = trial_folder(request.folder, trial.number)

    def learn(work: Path) -> WeightEdit:
        # Values that each can be had may not go together; then the trial failed, and says so.
        job = request.job_with(settings, folder.with_name(f"{folder.name}-run"))
        edit: WeightEdit = request.module.learn(job, bench.loaded, Events(), work, bench.shared)
        return measured_run.within_budget(measured_job_of(job), edit, bench.loaded, Events())

    outcome = tried(learn, bench, request.rules, before, settings, folder)
    study.tell(trial, outcome.state, outcome.values or None, outcome.record)


def _check_some_work(done: Sequence[Done]) -> None:
    """Stop a search all of whose trials fail.

    Raises:
        RequestError: The first ones failed, all of them.
    """
    if len(done) >= FAILED_AT_ONCE and all(one.state == "failed" for one in done):
        raise RequestError(f"all of the first {len(done)} trials failed, the last one: {done[-1].error}")
