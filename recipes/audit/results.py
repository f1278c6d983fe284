"""What an audit measured, compared and judged: the content of ``audit.json``, and the files that show it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ...artifacts.files.written import write_whole
from ...artifacts.reporting import audit_page, report
from ...artifacts.upgrade import SCHEMA_VERSION
from ...eval.audit.bounded import worst_cases
from ...eval.audit.findings import findings
from ...eval.audit.formats import format_findings
from ...eval.audit.recovery import RecoveryCurve, Scale
from ...eval.audit.verdict import Compared, envelope, furthest, judge
from ...eval.intervals import rate_interval
from ...eval.items import clusters_of
from .attacks.table import ATTACKS
from .command import command
from .curve_store import UNTOUCHED, UTILITY, CurveStore
from .floor import (
    GIVE,
    chance_of,
    floor_gaps,
    floor_of,
    floor_questions,
    guessing_curve,
    guessing_of,
    in_words,
    missing,
    unsure,
)
from .format_results import compare_formats, format_gaps, injected_bits
from .more_controls import control_findings, control_gaps, locked_control, removal_control
from .notes import continues_text
from .request import GUESSING, AuditJob, other_questions, questions_at_looks

NOT_RECORDED = {"out", "model", "base", "reference", "concept", "card", "fresh", "locked", "removed"}
"""Settings that say nothing of how models were attacked, or stand elsewhere."""


def conclude(
    job: AuditJob, curves: CurveStore, edit: dict[str, Any], depth: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The content of ``audit.json``: every attack's curves, the controls, the verdict, and what could not be tested.

    Args:
        edit: The anatomy of the edit.
        depth: How much of what the reference lacks its streams lack, where there is a reference.
    """
    floor = floor_of(job, curves.get("reference", UNTOUCHED).only if job.novel else None)
    compared, unscored = _compared(job, curves, floor)
    utility = _utility(job, curves)
    untouched = {subject: _untouched(job, curves, subject, floor) for subject in ("base", "edited", "reference")}
    scale = Scale(_chance(job, floor, untouched["reference"]), untouched["base"])
    has_both = {"base", "edited"} <= set(utility)
    others = clusters_of(job.concept, other_questions(job.concept))

    def of_others(subject: str) -> RecoveryCurve:
        return replace(curves.get(subject, UTILITY).only, clusters=others)

    both = (of_others("base"), of_others("edited")) if has_both else None
    judged = judge(compared, scale, both, in_words(floor), missing(job, floor))
    more = locked_control(job, curves, compared, floor) | removal_control(job, curves, compared, floor)
    before = _utility_before(job, curves)
    unknowing = [one.name for one in compared if not one.known and one.guessing is None]
    formats = compare_formats(job, curves, [one.name for one in compared if not one.known], floor)
    cases = worst_cases({name: curves.get("edited", name).by_rate for name in unknowing}, before)
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": judged.verdict,
        "reasons": judged.reasons,
        "speed_up": {**judged.speed_up.describe(), "share": judged.share},
        "worst_attack": judged.worst and judged.worst.describe(),
        "controls": {**judged.controls, **more, "floor_is": floor},
        "worst_cases": cases.describe(),
        "formats": [one.describe() for one in formats],
        "findings": [
            *control_findings(more),
            *format_findings(formats),
            *findings(compared, cases, None if floor == GUESSING else in_words(floor)),
            *(depth["sentences"] if depth else ()),
            *edit["sentences"],
        ],
        "anatomy": edit,
        "depth": depth,
        "attacks": [
            attack.describe(scale, before)
            | {"about": ATTACKS[attack.name].about, "bits": injected_bits(curves, attack.name)}
            | _tried(job, attack)
            for attack in compared
        ],
        "untouched": untouched,
        "utility": utility,
        "n": len(job.questions),
        "gaps": [*_gaps(job, curves, unscored, utility, floor), *control_gaps(more), *format_gaps(formats)],
        "notes": list(job.notes),
        "reused": curves.reused(),
        "command": command(job),
        "concept": {"ref": job.concept.ref, "name": job.concept.about.name, "sha256": job.concept.sha256},
        "models": {name: source.describe() for name, source in job.sources.items()},
        "settings": _settings(job),
    }


def write_results(job: AuditJob, results: dict[str, Any]) -> None:
    """Write the audit's folder; where that was asked for, amend the audited checkpoint too."""
    write_whole(job.out / "audit.json", json.dumps(results, indent=1))
    audit_page.write_report(job.out / "report.html", results)
    picture = audit_page.recovery_picture(results)
    # The audit's own folder keeps the paths that were typed; what may be published does not.
    published = {**results, "command": command(job, public=True)}
    audit_page.write_card(job.out, published, picture)
    if job.settings.card:
        folder = job.sources["edited"].folder
        audit_page.amend_card(folder, published, picture)
        beside = folder.parent / "report.html"
        if beside.is_file():
            report.report_of(folder, beside)


def _chance(job: AuditJob, floor: str, reference: float) -> float:
    """What recovery is measured from: guessing, and of what continues a text what the untouched reference answers."""
    if floor == GUESSING:
        return reference
    chance = chance_of(job.questions)
    continued = any(continues_text(job.concept, question) for question in job.questions)
    return max(chance, reference) if continued and "reference" in job.sources else chance


def _untouched(job: AuditJob, curves: CurveStore, subject: str, floor: str) -> float:
    """Accuracy without any attack."""
    if subject == "reference" and floor == GUESSING:
        return guessing_of(job.questions)
    return float(curves.get(subject, UNTOUCHED).only.accuracy[0])


def _compared(job: AuditJob, curves: CurveStore, floor: str) -> tuple[list[Compared], list[str]]:
    """Each attack at the learning rate that brought every model furthest, and the names of those that could not be
    scored."""
    base = replace(curves.get("base", UNTOUCHED).only, clusters=clusters_of(job.concept, job.questions))
    clusters = {"reference": clusters_of(job.concept, floor_questions(job))}
    compared: list[Compared] = []
    unscored: list[str] = []
    given_v, lacking = unsure(job, floor), missing(job, floor)
    asked = questions_at_looks(job.concept, job.budget.others)
    subjects = clusters_of(job.concept, asked)
    near = tuple(place for place, question in enumerate(asked) if question.split == "neighbour")
    measured = ("base", "edited") if floor == GUESSING else ("base", "edited", "reference")
    for name in job.attacks:
        by_subject = {subject: curves.get(subject, name) for subject in measured}
        chosen = {
            subject: (rate, replace(curve, clusters=clusters.get(subject, base.clusters)))
            for subject, one in by_subject.items()
            for rate, curve in [envelope(one.by_rate) if ATTACKS[name].searched else furthest(one.by_rate)]
        }
        # NaN stands where a question could not be scored; a mean over the rest would be of other questions than the
        # base's.
        if any(np.isnan(curve.hits).any() for _, curve in chosen.values()):
            unscored.append(name)
            continue
        if floor == GUESSING:
            chosen["reference"] = 0.0, guessing_curve(chosen["edited"][1], job.questions, ATTACKS[name].guessing)
        suppressed = curves.get("suppressed", name) if curves.has("suppressed", name) else None
        locked = curves.get("locked", name) if curves.has("locked", name) else None
        removed = curves.get("removed", name) if curves.has("removed", name) else None
        compared.append(
            Compared(
                name,
                ATTACKS[name].tier,
                ATTACKS[name].known or name in given_v,
                base=chosen["base"][1],
                edited=chosen["edited"][1],
                floor=chosen["reference"][1],
                control=furthest(suppressed.by_rate)[1] if suppressed else None,
                locked=replace(furthest(locked.by_rate)[1], clusters=base.clusters) if locked else None,
                removed=replace(furthest(removed.by_rate)[1], clusters=clusters["reference"]) if removed else None,
                rates={subject: _rate(job, name, key) for subject, (key, _) in chosen.items()},
                diverged=sum(one.diverged for one in by_subject.values()),
                guessing=ATTACKS[name].guessing,
                afresh=not (lacking.afresh and (floor == GUESSING or "V" in ATTACKS[name].sources)),
                floor_before=_floor_before(job, curves, name, floor),
                near=near,
                subjects=subjects,
                repaired=job.budget.repaired if ATTACKS[name].data == "retain+T" else 0,
            )
        )
    return compared, unscored


def _floor_before(job: AuditJob, curves: CurveStore, name: str, floor: str) -> float | None:
    """What the measured floor answers without an attack; None of one that counts in another way."""
    if floor == GUESSING or ATTACKS[name].guessing is not None:
        return None
    return float(curves.get("reference", UNTOUCHED).only.accuracy[0])


def _utility_before(job: AuditJob, curves: CurveStore) -> float | None:
    """What the edited model answers without an attack of the questions that are asked while it is attacked."""
    asked = {question.id for question in questions_at_looks(job.concept, job.budget.others)}
    if not asked or not curves.has("edited", UTILITY):
        return None
    hits = curves.get("edited", UTILITY).only.hits.ravel()
    others = other_questions(job.concept)
    return float(np.mean([hit for hit, question in zip(hits, others, strict=True) if question.id in asked]))


def _utility(job: AuditJob, curves: CurveStore) -> dict[str, dict[str, Any]]:
    """Accuracy on everything else, by subject."""
    utility, clusters = {}, clusters_of(job.concept, other_questions(job.concept))
    for subject in job.sources:
        if curves.has(subject, UTILITY):
            hits = curves.get(subject, UTILITY).only.hits.ravel().tolist()
            utility[subject] = {
                "value": sum(hits) / len(hits),
                "n": len(hits),
                "ci95": rate_interval(hits, clusters),
            }
    return utility


def _gaps(job: AuditJob, curves: CurveStore, unscored: Sequence[str], utility: dict[str, Any], floor: str) -> list[str]:
    """What was not tested, and why."""
    gaps = [*job.gaps, *floor_gaps(job, floor)]
    gaps += [f"{name} found too few questions to score; it is left out" for name in unscored]
    asked_floor = 0 if floor == GUESSING else curves.get("reference", UNTOUCHED).only.hits.shape[2]
    if asked_floor not in (0, len(job.questions)):
        gaps.append(f"the floor could be asked {asked_floor} questions, the other models {len(job.questions)}")
    if "reference" not in job.sources:
        gaps.append(f"how deep the edit goes (Unlearning Depth Score): needs a model that never knew; {GIVE}")
    if not {"base", "edited"} <= set(utility):
        gaps.append("the concept pack asks about nothing else, so nothing says whether the model still works")
    return gaps


def _tried(job: AuditJob, attack: Compared) -> dict[str, Any]:
    """What a search tried; the learning rate of the trial that got furthest with each model says which it was."""
    row = ATTACKS[attack.name]
    if not row.searched:
        return {}
    setups = [asdict(setup) for setup in job.budget.setups_of(row, job.settings.seed).values()]
    return {"trials": setups}


def _rate(job: AuditJob, name: str, key: float) -> float:
    """The learning rate of a curve; that of an untrained attack is its strength."""
    row = ATTACKS[name]
    tried = job.budget.setups_of(row, job.settings.seed) if row.searched else {}
    return tried[key].rate if key in tried else key


def _settings(job: AuditJob) -> dict[str, Any]:
    budget = job.budget
    recorded = job.settings.model_dump(mode="json", exclude=NOT_RECORDED)
    return recorded | {
        "locked": job.wants_locked,
        "removed": job.wants_removed,
        "steps": budget.steps,
        "batch": budget.batch,
        "seeds": budget.seeds,
    }
