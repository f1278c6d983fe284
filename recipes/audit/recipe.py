"""Does an edit hold? The same attacks on the edited model and on controls, compared and judged.

The subjects: ``base`` knows the concept; ``edited`` is the model in question; ``suppressed`` is the base trained to
answer wrongly, which attacks must bring back; ``reference`` was never trained on the concept (or is the base on made-up
facts).
"""

import shutil
from typing import Any

from ...artifacts.events import Events
from .audit_run import AuditRun
from .plan import describe
from .request import AuditJob, AuditSettings, prepare
from .results import conclude, write_results

__all__ = ["AuditJob", "AuditSettings", "describe", "prepare", "run"]


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
    results = conclude(job, audit.curves)
    write_results(job, results)
    shutil.rmtree(audit.work)
    return results


def _attack(audit: AuditRun, subject: str) -> None:
    """Load one model and attack it; the base also as the controls that are made from it."""
    target = audit.load(subject)
    audit.attack(target)
    if subject == "base":
        audit.attack_suppressed_control(target)
        audit.attack_novel_facts(target)
