"""Processes that share an audit: each takes the next part that nobody is at, until none is left.

A process of its own for each part would spend longer on its imports than on the smallest parts.
"""

import math
from collections.abc import Iterator

from ...artifacts.checkpoints.read import open_checkpoint
from ...artifacts.events import Events
from ...artifacts.models.memory import free_memory
from ...eval.inference.likelihood import VOCABULARY_BUDGET, tokens_of_batch
from ..common.memory_plan import RunMemory, surely_fits
from ..common.memory_sizes import Unplanned
from ..jobs.engines import own_cores
from ..jobs.job import Job, JobFolder
from .attackers import MOST_ATTACKERS
from .attacks.table import ATTACKS, SOFT_TOKENS
from .audit_run import AuditRun
from .parts import Part, parts_of
from .plan import longest_row, memory
from .request import AuditJob

WORKER = "worker-"
FEWEST_PARAMETERS = 2_000_000
"""Below, an audit is done before further processes have made their imports."""
SHARE = 0.8
"""Of the free memory that several processes may take; a plan is right to some percent."""


def is_worker(name: str) -> bool:
    """Whether a process is to take any part, not a named one."""
    return name.startswith(WORKER)


def workers_of(job: AuditJob, audit: AuditRun, count: int) -> list[Job]:
    """Workers for what is left to do, with names that none has who ended well: such a job is not run again."""
    records = JobFolder(audit.work)
    left = sum(not audit.is_done(part) for part in parts_of(job))
    numbered = (f"{WORKER}{number}" for number in range(1, 1 << 30))
    free = (name for name in numbered if not records.is_finished(name))
    return [job_of(job, audit, name) for name, _ in zip(free, range(min(count, left)), strict=False)]


def job_of(job: AuditJob, audit: AuditRun, name: str) -> Job:
    """The job of a part or a worker, by its name."""
    command = ("audit", job.settings.model, "--out", str(job.out), "--resume", "--part", name)
    return Job(name, command, job.out, own_folder=False, events=Part(name).events(audit.work))


def parts_for(job: AuditJob, events: Events, name: str) -> Iterator[AuditRun]:
    """An audit with one part after the other, for a worker that makes what it is given before it asks for the next."""
    audit = AuditRun(job, events, Part(name))
    for part in parts_of(job):
        if audit.is_done(part):
            continue
        with audit.curves.alone_at(part.name) as alone:
            # Another worker may have made it in the meantime.
            if alone and not audit.is_done(part):
                audit.part = part
                yield audit


def processes_for(job: AuditJob) -> int:
    """How many processes make an audit fastest on a processor: small operations gain little from more threads.

    One on a GPU, for small models, where attacks train nothing, and where memory holds no second process.
    """
    training = {ATTACKS[name].method for name in job.attacks if ATTACKS[name].trains}
    cores = own_cores()
    if job.device.type != "cpu" or cores < 2 or not training:
        return 1
    tensors = open_checkpoint(job.sources["base"].folder).tensors.values()
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    if parameters < FEWEST_PARAMETERS:
        return 1
    parts = len(parts_of(job))
    if not job.behaviour and plainly_fit(job, parameters, cores):
        return min(cores, parts)
    try:
        plan = memory(job)
    except Unplanned:
        return 1
    fitting = int(SHARE * plan.free / max(1, plan.peak.total))
    return max(1, min(cores, fitting, parts))


def plainly_fit(job: AuditJob, parameters: int, count: int) -> bool:
    """Whether so many processes of an audit on knowledge are so small that they need no plan, which takes seconds."""
    source = job.sources["base"]
    needs = RunMemory(source, open_checkpoint(source.folder), job.device, job.dtype, job.concept)
    trained = [ATTACKS[name] for name in job.attacks if ATTACKS[name].trains]
    setups = [setup for row in trained for setup in job.budget.setups_of(row, job.settings.seed).values()]
    step = MOST_ATTACKERS * max(setup.batch for setup in setups) * (longest_row(job, needs) + SOFT_TOKENS)
    asked = tokens_of_batch(needs.sizes.vocabulary, job.device)
    # Weights, their gradients and moments in fp32, as much again for each attacker beside them, and some logits.
    held = 16 * (1 + MOST_ATTACKERS) * parameters + 4 * VOCABULARY_BUDGET
    room = int(SHARE * free_memory(job.device)) // count - held
    return surely_fits(needs.checkpoint.config, max(step, asked), job.dtype.itemsize, room)
