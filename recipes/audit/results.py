"""What an audit found, compared and judged: the content of ``audit.json``."""

from typing import Any

import numpy as np

from ...artifacts.upgrade import SCHEMA_VERSION
from ...eval.audit.recovery import RecoveryCurve, Scale
from ...eval.audit.verdict import Compared, furthest, judge
from ...eval.statistics import wilson
from .attacks.table import ATTACKS
from .curve_store import UNTOUCHED, UTILITY, CurveStore
from .request import NOVEL, AuditJob


def conclude(prepared: AuditJob, found: CurveStore) -> dict[str, Any]:
    """The content of ``audit.json``: every attack's curves, the controls, the verdict, and what could not be tested."""
    utility = {
        subject: found.get(subject, UTILITY).by_rate[0.0].hits.ravel().tolist()
        for subject in prepared.sources if found.has(subject, UTILITY)
    }  # fmt: skip
    chances = [1 / len(question.choices) for question in prepared.questions]
    scale = Scale(sum(chances) / len(chances), float(found.get("base", UNTOUCHED).by_rate[0.0].accuracy[0]))
    compared, unscored = _compared(prepared, found)
    gaps = [*prepared.gaps, *(f"{name} found too few questions to score; it is left out" for name in unscored)]
    asked_floor = found.get("reference", UNTOUCHED).by_rate[0.0].hits.shape[2]
    if asked_floor != len(prepared.questions):
        gaps.append(f"the floor could be asked {asked_floor} questions, the other models {len(prepared.questions)}")
    floor_kind = "the model that never knew" if "reference" in prepared.sources else f"the base, on {NOVEL},"
    kept = tuple(sum(hits) / len(hits) for hits in (utility.get("base"), utility.get("edited")) if hits)
    if len(kept) < 2:
        gaps.append("the concept pack asks about nothing else, so nothing says whether the model still works")
    judged = judge(compared, scale, (kept[0], kept[1]) if len(kept) == 2 else None, floor_kind)
    return {
        "schema_version": SCHEMA_VERSION, "verdict": judged.verdict, "reasons": judged.reasons,
        "speed_up": {**judged.speed_up.describe(), "share": judged.share},
        "controls": {**judged.controls, "floor_is": "reference" if "reference" in prepared.sources else NOVEL},
        "attacks": [one.describe(scale) | {"about": ATTACKS[one.name].about} for one in compared],
        "untouched": {s: float(found.get(s, UNTOUCHED).by_rate[0.0].accuracy[0]) for s in ("base", "edited", "reference")},
        "utility": {
            name: {"value": sum(hits) / len(hits), "n": len(hits), "ci95": wilson(int(sum(hits)), len(hits))}
            for name, hits in utility.items()
        },
        "n": len(prepared.questions), "gaps": gaps, "recalled": found.recalled(), "command": _command(prepared),
        "concept": {"ref": prepared.concept.ref, "name": prepared.concept.about.name, "sha256": prepared.concept.sha256},
        "models": {name: source.describe() for name, source in prepared.sources.items()},
        "settings": prepared.settings.model_dump(mode="json", exclude={"out", "model", "base", "reference", "concept", "card", "fresh"})
        | {"steps": prepared.budget.steps, "batch": prepared.budget.batch, "seeds": prepared.budget.seeds},
    }  # fmt: skip


def _compared(prepared: AuditJob, found: CurveStore) -> tuple[list[Compared], list[str]]:
    """Each attack at the rate that brought every model furthest, and the names of those that could not be scored."""
    base = found.get("base", UNTOUCHED).by_rate[0.0]
    compared: list[Compared] = []
    unscored: list[str] = []
    for name in prepared.attacks:
        results = {subject: found.get(subject, name) for subject in ("base", "edited", "reference")}
        control = found.get("suppressed", name) if found.has("suppressed", name) else None
        chosen = {subject: furthest(result.by_rate) for subject, result in results.items()}
        if any(np.isnan(attacked.hits).any() for _, attacked in chosen.values()):
            unscored.append(name)
            continue
        compared.append(Compared(
            name, ATTACKS[name].tier, ATTACKS[name].known, chosen["base"][1], chosen["edited"][1], _matched(chosen["reference"][1], base),
            furthest(control.by_rate)[1] if control else None,
            {subject: rate for subject, (rate, _) in chosen.items()}, sum(result.diverged for result in results.values()),
        ))  # fmt: skip
    return compared, unscored


def _command(prepared: AuditJob) -> str:
    """The command that makes the audit again; models as they are published, never a local path."""
    settings, sources = prepared.settings, prepared.sources
    words = [
        "excise",
        "audit",
        sources["edited"].address,
        "--concept",
        prepared.concept.ref,
        "--base",
        sources["base"].address,
    ]
    if "reference" in sources:
        words += ["--reference", sources["reference"].address]
    words += ["--budget", settings.budget, "--seed", str(settings.seed)]
    if settings.attacks:
        words += ["--attacks", ",".join(settings.attacks)]
    if settings.questions:
        words += ["--questions", str(settings.questions)]
    return " ".join(words)


def _matched(floor: RecoveryCurve, base: RecoveryCurve) -> RecoveryCurve:
    """A floor on other questions is paired with as many of its own."""
    n, wanted = floor.hits.shape[2], base.hits.shape[2]
    if n == wanted:
        return floor
    places = np.resize(np.arange(n), wanted)
    return RecoveryCurve(floor.steps, floor.tokens, floor.hits[:, :, places])
