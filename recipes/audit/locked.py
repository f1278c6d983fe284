"""What an audit says of its password-locked control."""

from dataclasses import replace
from typing import Any

from ...eval.audit.compared import Compared
from ...eval.audit.locked import NAME, UNATTACKED, Lock, locked_recovery
from ...eval.audit.recovery import RecoveryCurve
from ...eval.items import clusters_of
from .curve_store import OPENED, UNTOUCHED, UTILITY, CurveStore, one_point
from .floor import chance_of
from .request import GUESSING, AuditJob, other_questions, questions_at_looks


def lock_of(job: AuditJob, curves: CurveStore) -> Lock:
    """The control before any attack, as it was measured."""
    clusters = clusters_of(job.concept, job.questions)
    base, closed, opened = (
        replace(curves.get(subject, name).only, clusters=clusters)
        for subject, name in (("base", UNTOUCHED), ("locked", UNTOUCHED), ("locked", OPENED))
    )
    others = None
    if curves.has("base", UTILITY) and curves.has("locked", UTILITY):
        others = _on_others(job, curves)
    return Lock(chance_of(job.questions), base, closed, opened, others)


def _on_others(job: AuditJob, curves: CurveStore) -> tuple[RecoveryCurve, RecoveryCurve]:
    """Base and control, on the questions on everything else that models are asked while they are attacked."""
    every, asked = other_questions(job.concept), questions_at_looks(job.concept, job.budget.others)
    hits = dict(zip((q.id for q in every), curves.get("base", UTILITY).only.hits.ravel().tolist(), strict=True))
    clusters = clusters_of(job.concept, asked)
    base, locked = one_point([hits[q.id] for q in asked]), curves.get("locked", UTILITY).only
    return replace(base, clusters=clusters), replace(locked, clusters=clusters)


def locked_control(job: AuditJob, curves: CurveStore, compared: list[Compared], floor: str) -> dict[str, Any]:
    """The control as ``audit.json`` holds it, by its name; nothing where it was not to be made."""
    if not job.wants_locked:
        return {}
    if not job.locked_attacks:
        return {"locked": {"limit": UNATTACKED}}
    return {"locked": locked_recovery(compared, lock_of(job, curves), measured=floor != GUESSING)}


def locked_gaps(controls: dict[str, Any]) -> list[str]:
    """Why the control shows nothing, where it shows nothing."""
    limit = controls.get("locked", {}).get("limit")
    return [f"{NAME}: {limit}"] if limit else []


def locked_findings(controls: dict[str, Any]) -> list[str]:
    """Whether the audit finds what only a password opens."""
    told = controls.get("locked", {}).get("told")
    return [told] if told else []
