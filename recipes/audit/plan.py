"""What an audit would do, for a dry run."""

from typing import Any

from .attacks.table import ATTACKS
from .floor import floor_gaps
from .request import AuditJob


def describe(job: AuditJob) -> dict[str, Any]:
    """What an audit would do."""
    budget = job.budget
    training = [ATTACKS[name] for name in job.attacks if ATTACKS[name].trains]
    return {
        "recipe": "audit",
        "out": str(job.out),
        "models": {name: source.name for name, source in job.sources.items()},
        "floor": job.reference,
        "questions": len(job.questions),
        "attacks": list(job.attacks),
        # Of four models at most: base, edited, suppressed control and reference.
        "attackers_that_train": sum(budget.seeds * len(budget.rates_of(row)) for row in training) * 4,
        "steps_each": budget.steps,
        "gaps": [*job.gaps, *floor_gaps(job)],
        "notes": list(job.notes),
    }
