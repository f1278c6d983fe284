"""What an audit says of its password-locked control."""

from dataclasses import replace
from typing import Any

from ...eval.audit.compared import Compared
from ...eval.audit.locked import NAME, Lock, locked_recovery
from ...eval.items import clusters_of
from .curve_store import OPENED, UNTOUCHED, UTILITY, CurveStore
from .floor import chance_of
from .request import GUESSING, AuditJob, other_questions


def lock_of(job: AuditJob, curves: CurveStore) -> Lock:
    """The control before any attack, as it was measured."""
    clusters = clusters_of(job.concept, job.questions)
    base, closed, opened = (
        replace(curves.get(subject, name).only, clusters=clusters)
        for subject, name in (("base", UNTOUCHED), ("locked", UNTOUCHED), ("locked", OPENED))
    )
    others = None
    if curves.has("base", UTILITY) and curves.has("locked", UTILITY):
        of_others = clusters_of(job.concept, other_questions(job.concept))
        each = [replace(curves.get(subject, UTILITY).only, clusters=of_others) for subject in ("base", "locked")]
        others = each[0], each[1]
    return Lock(chance_of(job.questions), base, closed, opened, others)


def locked_control(job: AuditJob, curves: CurveStore, compared: list[Compared], floor: str) -> dict[str, Any]:
    """The control as ``audit.json`` holds it, by its name; nothing where it was not to be made."""
    if not job.locked_attacks:
        return {}
    return {"locked": locked_recovery(compared, lock_of(job, curves), measured=floor != GUESSING)}


def locked_gaps(controls: dict[str, Any]) -> list[str]:
    """Why the control shows nothing, where it shows nothing."""
    limit = controls.get("locked", {}).get("limit")
    return [f"{NAME}: {limit}"] if limit else []


def locked_findings(controls: dict[str, Any]) -> list[str]:
    """Whether the audit finds what only a password opens."""
    told = controls.get("locked", {}).get("told")
    return [told] if told else []
