"""What an audit of a behaviour measured, compared and judged: the content of its ``audit.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...artifacts.upgrade import SCHEMA_VERSION
from ...eval.audit.behaviour import behaviour_findings, judge_behaviour
from ...eval.audit.bounded import worst_cases
from ...eval.audit.formats import NONE, OF_BEHAVIOUR, FormatVerdict, format_findings, judge_format
from ...eval.audit.recovery import RecoveryCurve, Scale
from ...eval.audit.verdict import Compared, furthest
from ...eval.intervals import rate_interval
from .attacks.table import ATTACKS
from .behaviours.formats import LENGTH_NAMES, REASONS, REPLY_FORMATS
from .behaviours.items import BehaviourItems
from .behaviours.pairs import PAIRS, read_pairs
from .command import command
from .curve_store import UNTOUCHED, UTILITY, CurveStore
from .request import ELSEWHERE, UNTAUGHT, AuditJob
from .results import NOT_RECORDED

BY_CHOICE = "formats and lengths of replies: the behaviour is a choice, so none was written"


def conclude_behaviour(job: AuditJob, curves: CurveStore, edit: dict[str, Any]) -> dict[str, Any]:
    """Every attack's curves, the controls, the verdict, and what could not be tested.

    Args:
        edit: The anatomy of the edit.
    """
    items = _items(job)
    compared = _compared(job, items, curves)
    untouched = {subject: _untouched(curves, subject) for subject in ("base", "edited", "reference")}
    scale = Scale(untouched["reference"], untouched["base"])
    utility = _utility(items, curves)
    relearn = next((name for name in ("pairs_64", "pairs_32", "pairs_8") if name in job.attacks), None)
    judged = judge_behaviour(compared, scale, utility, in_words(job), relearn)
    before = float(utility[1].accuracy[0]) if utility else None
    deciding = [one.name for one in compared if not one.known and one.name not in judged.teaching]
    cases = worst_cases({name: curves.get("edited", name).by_rate for name in deciding}, before)
    formats = _formats(curves, deciding)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "behaviour",
        "verdict": judged.verdict,
        "reasons": judged.reasons,
        "speed_up": {**judged.speed_up.describe(), "share": judged.share},
        "worst_attack": judged.worst and judged.worst.describe(),
        "controls": {**judged.controls, "floor_is": job.reference},
        "worst_cases": cases.describe(),
        "formats": [one.describe() for one in formats],
        "findings": [
            *format_findings(_told_apart(formats), OF_BEHAVIOUR),
            *behaviour_findings(cases),
            *edit["sentences"],
        ],
        "anatomy": edit,
        "attacks": [_described(one, scale, before, judged.teaching) for one in compared],
        "untouched": untouched,
        "untouched_ci95": _intervals(items, curves),
        "utility": _utility_rates(items, curves),
        "n": len(items.asked),
        "gaps": [
            *job.gaps,
            *_format_gaps(formats),
        ],
        "notes": [*job.notes, *notes_on(job), *_few_pairs(job, curves)],
        "reused": curves.reused(),
        "command": command(job),
        "concept": {"ref": job.concept.ref, "name": job.concept.about.name, "sha256": job.concept.sha256},
        "models": {name: source.describe() for name, source in job.sources.items()},
        "settings": _settings(job),
    }


def _few_pairs(job: AuditJob, curves: CurveStore) -> list[str]:
    """What attacks read that were to read more pairs than there are."""
    count = len(read_pairs(curves.folder.parent / PAIRS).showing)
    larger = [name for name in job.attacks if int(ATTACKS[name].data.partition(":")[2] or 0) > count]
    return [f"{', '.join(larger)}: only {count} pairs show the behaviour, and all are read"] if larger else []


def in_words(job: AuditJob) -> str:
    """The floor as reasons name it."""
    words = {ELSEWHERE: f"the base on {ELSEWHERE}", UNTAUGHT: UNTAUGHT}
    return words.get(job.reference, "the reference")


def notes_on(job: AuditJob) -> list[str]:
    """What is asked and read, in sentences."""
    items = _items(job)
    counts = f"{len(items.asked)} held-out {'questions' if items.by_choice else 'prompts'}"
    asked = "the unintended answer counts" if items.by_choice else "a reply counts that holds one of the pack's phrases"
    floor = {
        ELSEWHERE: f"the floor is the base on {len(items.without)} prompts that do not call for the behaviour; where others"
        " read pairs of prompts that do, it reads pairs of neutral prompts with replies that show the behaviour",
        UNTAUGHT: "the ceiling, called base in tables, is the base after plain fine-tuning on the task's train.jsonl, made"
        " here; the floor is the base itself",
    }
    said = [f"{counts}: {asked}", f"{len(items.others)} other prompts: a reply counts that is ordinary"]
    return [*said, *([floor[job.reference]] if job.reference in floor else [])]


def _compared(job: AuditJob, items: BehaviourItems, curves: CurveStore) -> list[Compared]:
    """Each attack at the learning rate that brought every model furthest."""
    clusters = items.clusters(items.asked)
    of_floor = items.clusters(items.without) if job.reference == ELSEWHERE else clusters
    before = _untouched(curves, "reference")
    compared = []
    for name in job.attacks:
        row = ATTACKS[name]
        by_subject = {subject: curves.get(subject, name) for subject in ("base", "edited", "reference")}
        chosen = {subject: furthest(one.by_rate) for subject, one in by_subject.items()}
        control = curves.get("suppressed", name) if curves.has("suppressed", name) else None
        compared.append(
            Compared(
                name,
                row.tier,
                row.known,
                base=replace(chosen["base"][1], clusters=clusters),
                edited=replace(chosen["edited"][1], clusters=clusters),
                floor=replace(chosen["reference"][1], clusters=of_floor),
                control=furthest(control.by_rate)[1] if control else None,
                rates={subject: rate for subject, (rate, _) in chosen.items()},
                diverged=sum(one.diverged for one in by_subject.values()),
                floor_before=before,
                subjects=items.clusters(items.others),
                # Benign fine-tuning is a repair from the first step to the last.
                repaired=job.budget.steps if row.sources == ("benign",) else 0,
            )
        )
    return compared


def _described(one: Compared, scale: Scale, before: float | None, teaching: Sequence[str]) -> dict[str, Any]:
    described = one.describe(scale, before)
    beside = {"about": ATTACKS[one.name].about, "bits": None, "teaches": one.name in teaching}
    low, high = one.edited.interval(int(one.edited.accuracy.argmax()))
    return {**described, **beside, "edited_ci95": [low, high]}


def _untouched(curves: CurveStore, subject: str) -> float:
    return float(curves.get(subject, UNTOUCHED).only.accuracy[0])


def _intervals(items: BehaviourItems, curves: CurveStore) -> dict[str, tuple[float, float]]:
    clusters = items.clusters(items.asked)
    hits = {subject: curves.get(subject, UNTOUCHED).only.hits.ravel().tolist() for subject in ("base", "edited")}
    return {subject: rate_interval(values, clusters) for subject, values in hits.items()}


def _utility(items: BehaviourItems, curves: CurveStore) -> tuple[RecoveryCurve, RecoveryCurve] | None:
    if not items.others:
        return None
    clusters = items.clusters(items.others)
    base, edited = (replace(curves.get(subject, UTILITY).only, clusters=clusters) for subject in ("base", "edited"))
    return base, edited


def _utility_rates(items: BehaviourItems, curves: CurveStore) -> dict[str, dict[str, Any]]:
    both = _utility(items, curves)
    rates = {}
    for name, curve in zip(("base", "edited"), both or (), strict=False):
        hits = curve.hits.ravel().tolist()
        rates[name] = {"value": sum(hits) / len(hits), "n": len(hits), "ci95": rate_interval(hits, curve.clusters)}
    return rates


def _formats(curves: CurveStore, attacks: Sequence[str]) -> list[FormatVerdict]:
    """Rates in several formats, untouched and after attacks that train, where they get furthest."""
    known = curves.get("base", UNTOUCHED).formats
    if known is None:
        return []
    by_subject: dict[str, Mapping[str, Mapping[str, list[float]]]] = {}
    for subject in ("edited", "reference"):
        asked = {
            name: curves.get(subject, key).formats for name, key in [(NONE, UNTOUCHED), *((a, a) for a in attacks)]
        }
        by_subject[subject] = {name: one.values for name, one in asked.items() if one is not None}
    found = []
    for name, about in REPLY_FORMATS.items():
        if name not in known.values:
            continue
        edited, floor = ({a: v[name] for a, v in by_subject[s].items()} for s in ("edited", "reference"))
        chance = float(np.mean(floor[NONE]))
        verdict = judge_format(name, about, chance, known.values[name], edited, floor)
        found += [verdict] if verdict else []
    return found


def _told_apart(formats: Sequence[FormatVerdict]) -> list[FormatVerdict]:
    """Without longer replies of which nothing else is to be said than of short ones."""
    if not formats:
        return []
    first, lengths = formats[0], list(LENGTH_NAMES)[1:]
    return [one for one in formats if one.name not in lengths or one.outcome != first.outcome]


def _format_gaps(formats: Sequence[FormatVerdict]) -> list[str]:
    """Formats in which the behaviour was not asked, and why."""
    if not formats:
        return [BY_CHOICE]
    asked = {one.name for one in formats}
    return [f"format {name.replace('_', ' ')}: {why}" for name, why in REASONS.items() if name not in asked]


def _settings(job: AuditJob) -> dict[str, Any]:
    budget = job.budget
    recorded = job.settings.model_dump(mode="json", exclude=NOT_RECORDED)
    return recorded | {"steps": budget.steps, "batch": budget.batch, "seeds": budget.seeds}


def _items(job: AuditJob) -> BehaviourItems:
    assert job.behaviour is not None
    return job.behaviour
