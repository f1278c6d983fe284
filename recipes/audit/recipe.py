"""Does an edit hold? The same attacks on the edited model and on controls, compared and judged.

The subjects: ``base`` knows the concept; ``edited`` is the model in question; ``suppressed`` is the base trained to
answer wrongly, which attacks must bring back; ``locked``, in longer audits, the base trained to answer rightly only
after a password; ``reference`` was never trained on the concept (or is the base on made-up facts); ``removed``, in longer
audits, the reference, taught the concept in known weights that were then taken out.
"""

import shutil
from typing import Any

from ...artifacts.event_log import gather_events
from ...artifacts.events import Events
from ...editing.errors import ExciseError
from ..jobs.board import board
from ..jobs.engines import Engine, Local
from ..jobs.fork_server import end_fork_server
from ..jobs.run import run_jobs
from .anatomy import anatomy_of
from .audit_run import AuditRun
from .behaviour_results import conclude_behaviour
from .behaviour_run import attack_behaviour
from .depth import depth_of
from .parts import events_of_parts, part_called, parts_of
from .plan import describe, memory
from .request import AuditJob, AuditSettings, prepare
from .results import conclude, write_results
from .workers import is_worker, job_of, parts_for, processes_for, workers_of

__all__ = ["AuditJob", "AuditSettings", "describe", "memory", "prepare", "run", "run_beside", "run_part", "run_split"]


def run(job: AuditJob, events: Events) -> dict[str, Any]:
    """Attack every model, compare, judge, and write ``audit.json``, ``report.html`` and ``card.md``.

    A killed audit goes on at the attack it was in.
    """
    audit = AuditRun(job, events)
    if not job.settings.fresh:
        audit.reuse_earlier_curves()
    for subject in job.sources:
        if not audit.is_complete(subject):
            _attack(audit, subject)
    return _concluded(audit)


def run_beside(job: AuditJob, events: Events, again: str) -> dict[str, Any]:
    """The same, in as many processes as are fastest on this machine: one where nothing is gained."""
    count = processes_for(job)
    if count == 1:
        end_fork_server()
        return run(job, events)
    events.note(f"{count} processes attack beside each other; --jobs local:1 takes one")
    return run_split(job, events, Local(count), again)


def run_split(job: AuditJob, events: Events, engine: Engine, again: str) -> dict[str, Any]:
    """The same, in parts that an engine runs beside each other; curves, and so the results, are those of ``run``.

    Processes of this machine take one part after the other; on a cluster each part is a job.

    Args:
        again: The command that goes on after an interrupt or a failure.

    Raises:
        ExciseError: A part failed; what the others made is kept.
    """
    audit = AuditRun(job, events)
    if not job.settings.fresh:
        audit.reuse_earlier_curves()
    if isinstance(engine, Local):
        jobs = workers_of(job, audit, engine.at_once)
    else:
        jobs = [job_of(job, audit, part.name) for part in parts_of(job) if not audit.is_done(part)]
    outcomes = run_jobs(jobs, engine, audit.work, again=again, shown=board(stages=isinstance(engine, Local)))
    gather_events(events_of_parts(audit.work), job.out / "events.jsonl")
    if failed := [outcome for outcome in outcomes if outcome.failed]:
        first = failed[0]
        raise ExciseError(
            f"{len(failed)} of {len(outcomes)} {'processes' if isinstance(engine, Local) else 'parts'} of the audit failed;"
            f" {first.job.name}: {first.error} (log: {first.log}). What was made is kept; then go on with {again}"
        )
    return _concluded(audit)


def run_part(job: AuditJob, events: Events, name: str) -> dict[str, Any]:
    """One part alone, for ``run_split``, or, of a worker, all that no other is at; curves stay in the working folder.

    Raises:
        RequestError: The audit has no such part.
    """
    if is_worker(name):
        for audit in parts_for(job, events, name):
            _attack_part(audit)
        return {"part": name}
    part = part_called(job, name)
    audit = AuditRun(job, events, part)
    if not audit.is_done(part):
        _attack_part(audit)
    return {"part": name}


def _concluded(audit: AuditRun) -> dict[str, Any]:
    with audit.events.stage("compare the weights") as stage:
        edit = anatomy_of(audit.job, stage)
    if audit.job.behaviour:
        results = conclude_behaviour(audit.job, audit.curves, edit)
    else:
        results = conclude(audit.job, audit.curves, edit, depth_of(audit))
    write_results(audit.job, results)
    shutil.rmtree(audit.work)
    return results


def _attack_part(audit: AuditRun) -> None:
    """The part of this process."""
    assert audit.part is not None
    # Without a model that never knew the concept, the floor is made from the base, as the suppressed control is.
    source = "reference" if audit.part.subject == "removed" else audit.part.subject
    _attack(audit, source if source in audit.job.sources else "base")


def _attack(audit: AuditRun, subject: str) -> None:
    """Load one model and attack it; the base also as the controls that are made from it."""
    if audit.job.behaviour:
        return attack_behaviour(audit, subject)
    target = audit.load(subject)
    audit.attack(target)
    if subject == "base":
        audit.attack_suppressed_control(target)
        audit.attack_locked_control(target)
        audit.attack_novel_facts(target)
    if subject == "reference":
        audit.attack_removal_control(target)
