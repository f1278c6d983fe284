"""Does an edit hold? The same attacks on the edited model and on controls, compared and judged.

The subjects: ``base`` knows the concept; ``edited`` is the model in question; ``suppressed`` is the base trained to
answer wrongly, which attacks must bring back; ``locked``, in longer audits, the base trained to answer rightly only
after a password; ``reference`` was never trained on the concept (or is the base on made-up
facts).
"""

import shutil
from typing import Any

from ...artifacts.event_log import gather_events
from ...artifacts.events import Events
from ...editing.errors import ExciseError
from ..jobs.engines import Engine
from ..jobs.job import Job
from ..jobs.run import run_jobs
from .anatomy import anatomy_of
from .audit_run import AuditRun
from .behaviour_results import conclude_behaviour
from .behaviour_run import attack_behaviour
from .depth import depth_of
from .parts import Part, part_called, parts_of
from .plan import describe, memory
from .request import AuditJob, AuditSettings, prepare
from .results import conclude, write_results

__all__ = ["AuditJob", "AuditSettings", "describe", "memory", "prepare", "run", "run_part", "run_split"]


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


def run_split(job: AuditJob, events: Events, engine: Engine, again: str) -> dict[str, Any]:
    """The same, in parts that an engine runs beside each other; curves, and so the results, are those of ``run``.

    Args:
        again: The command that goes on after an interrupt or a failure.

    Raises:
        ExciseError: A part failed; what the others made is kept.
    """
    audit = AuditRun(job, events)
    if not job.settings.fresh:
        audit.reuse_earlier_curves()
    parts = [part for part in parts_of(job) if not audit.is_done(part)]
    outcomes = run_jobs([_job_of(job, audit, part) for part in parts], engine, audit.work, again=again)
    gather_events([part.events(audit.work) for part in parts_of(job)], job.out / "events.jsonl")
    if failed := [outcome for outcome in outcomes if outcome.failed]:
        first = failed[0]
        raise ExciseError(
            f"{len(failed)} of {len(outcomes)} parts of the audit failed; {first.job.name}: {first.error} (log:"
            f" {first.log}). The other parts are kept; then go on with {again}"
        )
    return _concluded(audit)


def run_part(job: AuditJob, events: Events, name: str) -> dict[str, Any]:
    """One part alone, for ``run_split``; its curves stay in the working folder.

    Raises:
        RequestError: The audit has no such part.
    """
    part = part_called(job, name)
    audit = AuditRun(job, events, part)
    if not audit.is_done(part):
        # Without a model that never knew the concept, the floor is made from the base, as the suppressed control is.
        _attack(audit, part.subject if part.subject in job.sources else "base")
    return {"part": name}


def _job_of(job: AuditJob, audit: AuditRun, part: Part) -> Job:
    command = ("audit", job.settings.model, "--out", str(job.out), "--resume", "--part", part.name)
    return Job(part.name, command, job.out, own_folder=False, events=part.events(audit.work))


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
