"""Does an edit hold? The same attacks on base, edited model, a model that never knew, and one that merely hides it."""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.staging import write_whole
from ...artifacts.checkpoints.tensor_cache import TensorCache, scope_of
from ...artifacts.events import Events
from ...artifacts.models.cache import cache_folder
from ...artifacts.models.load import LoadedModel, load_model
from ...artifacts.reporting import audit_page as audit_report
from ...artifacts.reporting import report
from ...artifacts.upgrade import SCHEMA_VERSION
from ...editing.architectures import architecture_of, layer_count
from ...editing.training.adapters import adapter_modules
from ...editing.training.parallel_adapters import low_rank_attackers
from ...eval.concept import Concept, Question
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.run_folder import start_folder
from ..data.facts import Facts
from .attack_data import AttackData, novel_facts
from .attackers import trained
from .attacks.table import ATTACKS, untrained
from .curve_store import UNTOUCHED, UTILITY, YARDSTICKS, AttackCurves, CurveStore, code_digest
from .request import AuditJob, AuditSettings, describe, prepare
from .results import conclude
from .suppressed_control import train_suppressed_control

__all__ = ["AuditJob", "AuditSettings", "describe", "prepare", "run"]

OTHERS = 200
"""Questions on other things that show whether the model still works, at most."""


def run(prepared: AuditJob, events: Events) -> dict[str, Any]:
    """Attack every model, compare, judge, and write ``audit.json`` and ``report.html``.

    A killed audit goes on at the attack it was in.
    """
    work = start_folder(prepared.out, prepared.settings)
    events.path = prepared.out / "events.jsonl"
    found = CurveStore(work / "attacked", _yardsticks(prepared))
    if not prepared.settings.fresh:
        _recall(prepared, found)
    for subject, source in prepared.sources.items():
        if _complete(subject, prepared, found) and (subject != "base" or _controls_complete(prepared, found)):
            continue
        with events.stage(f"load {subject}"):
            loaded = load_model(source, prepared.device, prepared.dtype)
        material = AttackData.of(
            prepared.concept, prepared.facts, loaded.tokenizer, prepared.questions, prepared.settings.seed,
            prepared.sources["base"].folder,
        )  # fmt: skip
        _attack(subject, loaded, material, prepared, found, work, events)
        if subject == "base":
            _attack_controls(loaded, material, prepared, found, work, events)
        del loaded
        gc.collect()
    results = conclude(prepared, found)
    write_whole(prepared.out / "audit.json", json.dumps(results, indent=1))
    audit_report.write_report(prepared.out / "report.html", results)
    picture = audit_report.recovery_picture(results)
    audit_report.write_card(prepared.out, results, picture)
    if prepared.settings.card:
        folder = prepared.sources["edited"].folder
        audit_report.amend_card(folder, results, picture)
        if (beside := folder.parent / "report.html").is_file():
            report.report_of(folder, beside)
    shutil.rmtree(work)
    return results


def _attack(
    subject: str, loaded: LoadedModel, material: AttackData, prepared: AuditJob, found: CurveStore, work: Path, events: Events
) -> None:  # fmt: skip
    """All attacks on one model; those that are kept already are not made again."""
    model, budget = loaded.model, prepared.budget
    if not found.has(subject, UNTOUCHED):
        found.put(subject, UNTOUCHED, AttackCurves.once(material.exam.hits(model)))
    others = _others(prepared, subject)
    if others and not found.has(subject, UTILITY):
        found.put(subject, UTILITY, AttackCurves.once(MultipleChoiceSet(loaded.tokenizer, others).hits(model)))
    plain = [name for name in prepared.attacks if ATTACKS[name].score and not found.has(subject, name)]
    if plain:
        with events.stage(f"question {subject}", len(plain)) as stage:
            for name in plain:
                found.put(subject, name, AttackCurves({0.0: untrained(model, ATTACKS[name], material)}, 0))
                stage.advance()
    for names in _groups(prepared.attacks):
        names = [name for name in names if not found.has(subject, name)]
        if not names:
            continue
        exams = len(names) * len(budget.rates[ATTACKS[names[0]].method]) * budget.seeds * len(budget.marks)
        with events.stage(f"attack {subject}: {', '.join(names)}", exams) as stage:
            curves = trained(
                model, {name: ATTACKS[name] for name in names}, material, budget, prepared.settings.seed, stage, work
            )
        for name, result in curves.items():
            found.put(subject, name, result, names)


def _groups(attacks: Sequence[str]) -> list[list[str]]:
    """Attacks that train, those of one method together."""
    training = [name for name in attacks if not ATTACKS[name].score]
    methods = dict.fromkeys(ATTACKS[name].method for name in training)
    return [[name for name in training if ATTACKS[name].method == method] for method in methods]


def _yardsticks(prepared: AuditJob) -> TensorCache:
    """Earlier audits' curves of base and controls, by everything that they depend on."""
    scopes = [
        scope_of(prepared.sources[name].folder, prepared.dtype, prepared.device)
        for name in ("base", "reference") if name in prepared.sources
    ]  # fmt: skip
    asked = tuple(question.id for question in prepared.questions)
    about = (
        scopes,
        prepared.concept.sha256,
        asked,
        prepared.settings.seed,
        prepared.budget,
        SCHEMA_VERSION,
        code_digest(),
    )
    return TensorCache(cache_folder() / "audits", repr(about))


def _recall(prepared: AuditJob, found: CurveStore) -> None:
    """Take over what an earlier audit found of the yardsticks."""
    for subject in YARDSTICKS:
        attacks = (_for_hidden(prepared) if subject == "suppressed" else prepared).attacks
        for name in (UNTOUCHED, UTILITY, *(name for name in attacks if ATTACKS[name].score)):
            found.recall(subject, name)
        for names in _groups(attacks):
            for name in names:
                found.recall(subject, name, names)


def _complete(subject: str, prepared: AuditJob, found: CurveStore) -> bool:
    return found.has(subject, UNTOUCHED, *([UTILITY] if _others(prepared, subject) else []), *prepared.attacks)


def _attack_controls(
    loaded: LoadedModel, material: AttackData, prepared: AuditJob, found: CurveStore, work: Path, events: Events
) -> None:
    """A model that merely hides its knowledge; and, without a model that never knew, the base on facts nobody knows."""
    hidden = _for_hidden(prepared)
    if hidden.attacks and not _complete("suppressed", hidden, found):
        with _hidden(loaded, material, prepared, work, events):
            _attack("suppressed", loaded, material, hidden, found, work, events)
    if "reference" in prepared.sources or _complete("reference", prepared, found):
        return
    facts, questions = novel_facts(prepared.facts, prepared.concept.questions, prepared.settings.seed)
    asked = tuple(q for q in questions if q.split == "forget")
    concept = replace(
        prepared.concept,
        questions=(*asked, *(q for q in prepared.concept.questions if q.split != "forget")),
        forget=_retold(facts, prepared.concept),
    )
    tested = [q for q in asked if q.group == "V"][: len(prepared.questions)]
    novel = AttackData.of(concept, facts, loaded.tokenizer, tested, prepared.settings.seed, material.base)
    _attack("reference", loaded, novel, prepared, found, work, events)


def _for_hidden(prepared: AuditJob) -> AuditJob:
    """The attacks that a model which hides its knowledge is put to: those that fine-tune it on the concept."""
    names = (name for name in prepared.attacks if ATTACKS[name].tier == 2 and ATTACKS[name].method == "lora")
    return replace(prepared, attacks=tuple(name for name in names if ATTACKS[name].data in ("T", "V")))


def _controls_complete(prepared: AuditJob, found: CurveStore) -> bool:
    hidden = _for_hidden(prepared)
    floor = "reference" in prepared.sources or _complete("reference", prepared, found)
    return floor and (not hidden.attacks or _complete("suppressed", hidden, found))


@contextmanager
def _hidden(
    loaded: LoadedModel, material: AttackData, prepared: AuditJob, work: Path, events: Events
) -> Iterator[None]:
    """The base with a small update of its last layer that gives wrong answers: all it knew is still below."""
    config = loaded.model.config.to_dict()
    modules = adapter_modules(loaded.model, architecture_of(config), [layer_count(config) - 1])
    with low_rank_attackers(loaded.model, modules, 8, 16.0, [prepared.settings.seed]) as attackers:
        with events.stage("make a model that hides it") as stage:
            train_suppressed_control(loaded.model, attackers, material, prepared.settings.seed, stage, work)
        yield


def _others(prepared: AuditJob, subject: str) -> list[Question]:
    """Questions on everything else, evenly drawn; controls made here are not asked."""
    others = [q for q in prepared.concept.questions if q.split != "forget" and subject in prepared.sources]
    return others[:: max(1, len(prepared.concept.questions) // OTHERS)]


def _retold(facts: Facts, concept: Concept) -> tuple[Any, ...]:
    """The pack's texts about facts that nobody knows, for attacks that quote texts."""
    found = []
    for number, fact in enumerate(facts.facts):
        for wording in facts.phrasings.get(fact.relation, ())[:1]:
            text = wording.replace("{subject}", fact.subject).replace("{answer}", fact.answer)
            found.append(
                concept.forget[0].model_copy(update={"id": f"novel-{number}", "text": text, "group": fact.group})
            )
    return tuple(found)
