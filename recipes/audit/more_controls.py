"""What a longer audit says of the controls that decide no verdict: the password-locked one, and the removal control."""

from dataclasses import replace
from typing import Any

from ...eval.audit import locked, removed
from ...eval.audit.compared import Compared
from ...eval.audit.locked import UNATTACKED, Lock, locked_recovery
from ...eval.audit.recovery import RecoveryCurve
from ...eval.audit.removed import UNMEASURED, Removal, removal_recovery
from ...eval.items import clusters_of
from .curve_store import OPENED, TAUGHT, UNTOUCHED, UTILITY, CurveStore, one_point
from .floor import chance_of, floor_questions, in_words
from .request import GUESSING, AuditJob, other_questions, questions_at_looks

NAMES = {"locked": locked.NAME, "removed": removed.NAME}
"""By the names under which ``audit.json`` has them."""


def lock_of(job: AuditJob, curves: CurveStore) -> Lock:
    """The control before any attack, as it was measured."""
    clusters = clusters_of(job.concept, job.questions)
    base, closed, opened = (
        replace(curves.get(subject, name).only, clusters=clusters)
        for subject, name in (("base", UNTOUCHED), ("locked", UNTOUCHED), ("locked", OPENED))
    )
    return Lock(chance_of(job.questions), base, closed, opened, _on_others(job, curves, "base", "locked"))


def removal_of(job: AuditJob, curves: CurveStore) -> Removal:
    """The removal control before any attack, as it was measured."""
    questions = floor_questions(job)
    clusters = clusters_of(job.concept, questions)
    taught, left = (replace(curves.get("removed", name).only, clusters=clusters) for name in (TAUGHT, UNTOUCHED))
    # Without a model that never knew, it is made from the base.
    start = "reference" if "reference" in job.sources else "base"
    return Removal(chance_of(questions), taught, left, _on_others(job, curves, start, "removed"))


def _on_others(
    job: AuditJob, curves: CurveStore, start: str, control: str
) -> tuple[RecoveryCurve, RecoveryCurve] | None:
    """A control and what it was made from, on the questions on everything else that models are asked while they are
    attacked; None where either was not asked."""
    if not (curves.has(start, UTILITY) and curves.has(control, UTILITY)):
        return None
    every, asked = other_questions(job.concept), questions_at_looks(job.concept, job.budget.others)
    hits = dict(zip((q.id for q in every), curves.get(start, UTILITY).only.hits.ravel().tolist(), strict=True))
    clusters = clusters_of(job.concept, asked)
    before, after = one_point([hits[q.id] for q in asked]), curves.get(control, UTILITY).only
    return replace(before, clusters=clusters), replace(after, clusters=clusters)


def locked_control(job: AuditJob, curves: CurveStore, compared: list[Compared], floor: str) -> dict[str, Any]:
    """The control as ``audit.json`` holds it, by its name; nothing where it was not to be made."""
    if not job.wants_locked:
        return {}
    if not job.locked_attacks:
        return {"locked": {"limit": UNATTACKED}}
    return {"locked": locked_recovery(compared, lock_of(job, curves), measured=floor != GUESSING)}


def removal_control(job: AuditJob, curves: CurveStore, compared: list[Compared], floor: str) -> dict[str, Any]:
    """The same of the removal control."""
    if not job.wants_removed:
        return {}
    if floor == GUESSING:
        return {"removed": {"limit": UNMEASURED}}
    if not job.removed_attacks:
        return {"removed": {"limit": UNATTACKED}}
    return {"removed": removal_recovery(compared, removal_of(job, curves), floor=in_words(floor))}


def control_gaps(controls: dict[str, Any]) -> list[str]:
    """Why a control shows nothing, where it shows nothing."""
    limits = {name: controls.get(name, {}).get("limit") for name in NAMES}
    return [f"{NAMES[name]}: {limit}" for name, limit in limits.items() if limit]


def control_findings(controls: dict[str, Any]) -> list[str]:
    """Whether the audit finds what only a password opens, and nothing where nothing is left."""
    return [controls[name]["told"] for name in NAMES if "told" in controls.get(name, {})]
