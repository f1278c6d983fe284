"""Does an edit hold? The same attacks on base, edited model, a model that never knew, and one that merely hides it."""

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from ..artifacts import audit_report, report
from ..artifacts.checkpoints import Checkpoint, open_checkpoint
from ..artifacts.concepts import load_concept, nearest
from ..artifacts.events import Events
from ..artifacts.kept import KeptTensors, scope_of
from ..artifacts.manifest import verify_folder
from ..artifacts.models import (
    LoadedModel,
    ModelSource,
    builtin_models,
    cache_folder,
    check_memory,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
    load_tokenizer,
)
from ..artifacts.staging import write_whole
from ..editing.adapters import adapter_modules
from ..editing.architectures import architecture_of, layer_count
from ..editing.errors import RequestError
from ..editing.side_by_side import low_rank_attackers
from ..eval.concept import Concept, Question
from ..eval.exam import Exam
from ..eval.recovery import Attacked, Scale, questions_needed
from ..eval.statistics import wilson
from ..eval.verdict import Compared, furthest, judge
from .attacked import UTILITY, YARDSTICKS, Found, Trained, code_digest
from .attackers import Budget, trained
from .attacks import ATTACKS, BUDGETS, untrained
from .contexts import Facts, find_facts, spread
from .hiding import hide
from .material import Material, novel_facts
from .request import RunRequest, free_folder, refuse_taken, start_folder
from .training import memory_for_whole_weights

SCHEMA_VERSION = 1
FEWEST = 20
"""Questions of group V below which no audit is made."""
OTHERS = 200
"""Questions on other things that show whether the model still works, at most."""
UNTOUCHED = "untouched"
NOVEL = "facts that nobody knows"


class AuditSettings(RunRequest):
    """What to audit, against what, and how hard."""

    model: str
    """Model to audit: any, edited here or elsewhere."""
    concept: str = "builtin:potions"
    base: str = "builtin:testbed"
    """The model it was made from."""
    never: str | None = None
    """A model that never knew the concept; without one, facts that nobody knows are learned instead."""
    attacks: tuple[str, ...] = ()
    """Names of attacks; none takes those of the budget."""
    budget: Literal["quick", "standard", "long"] = "quick"
    """How long: minutes, tens of minutes, hours."""
    questions: int = Field(0, ge=0)
    """Questions of group V to ask, at most, evenly drawn; 0 takes all."""
    card: bool = False
    """Also put the audit into the audited checkpoint, which excise must have made: a section of its card, and its figures."""
    fresh: bool = False
    """Attack base and controls anew, although an earlier audit of the same base and concept kept their curves."""


@dataclass(frozen=True)
class Prepared:
    """A checked request."""

    settings: AuditSettings
    sources: dict[str, ModelSource]
    """By subject: base, edited, and never where there is one."""
    concept: Concept
    facts: Facts
    questions: tuple[Question, ...]
    """Of group V."""
    attacks: tuple[str, ...]
    budget: Budget
    device: torch.device
    dtype: torch.dtype
    out: Path
    gaps: tuple[str, ...] = ()
    """What cannot be tested here, and why."""


def prepare(settings: AuditSettings, *, resume: bool = False) -> Prepared:
    """Check names, files, memory and whether the models belong together, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    concept = load_concept(settings.concept)
    questions = tuple(q for q in concept.questions if q.split == "forget" and q.group == "V")
    facts = find_facts(concept)
    questions = tuple(spread(questions, settings.questions or len(questions), f"excise audit {settings.seed}"))
    _check_concept(concept, questions, facts)
    budget = BUDGETS[settings.budget]
    attacks = settings.attacks or budget.attacks
    unknown = [name for name in attacks if name not in ATTACKS]
    if unknown:
        raise RequestError(
            f"no attack {unknown[0]!r}{nearest(unknown[0], list(ATTACKS))}; attacks: {', '.join(ATTACKS)}"
        )
    out = settings.out or free_folder("audit")
    if not resume:
        refuse_taken(out)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    base = find_model(settings.base)
    sources = {"base": base, "edited": find_model(settings.model)}
    never = settings.never or _builtin_never(settings)
    if never:
        sources["never"] = find_model(never)
    checkpoints = {name: open_checkpoint(source.folder) for name, source in sources.items()}
    for name, source in sources.items():
        check_memory(checkpoints[name], device, dtype)
        _check_descent(name, source, checkpoints[name], base, checkpoints["base"])
    if settings.card:
        verify_folder(sources["edited"].folder)
    kept, gaps = _affordable(attacks, checkpoints["base"], device)
    return Prepared(settings, sources, concept, facts, questions, kept, budget, device, dtype, out, gaps)


def describe(prepared: Prepared) -> dict[str, Any]:
    """What an audit would do."""
    budget = prepared.budget
    training = [name for name in prepared.attacks if not ATTACKS[name].score]
    return {
        "recipe": "audit", "out": str(prepared.out), "models": {name: s.name for name, s in prepared.sources.items()},
        "floor": "never" if "never" in prepared.sources else NOVEL, "questions": len(prepared.questions),
        "attacks": list(prepared.attacks), "attackers_that_train": sum(
            budget.seeds * len(budget.rates[ATTACKS[name].method]) for name in training
        ) * 4, "steps_each": budget.steps, "gaps": list(prepared.gaps),
    }  # fmt: skip


def run(prepared: Prepared, events: Events) -> dict[str, Any]:
    """Attack every model, compare, judge, and write ``audit.json`` and ``report.html``.

    A killed audit goes on at the attack it was in.
    """
    work = start_folder(prepared.out, prepared.settings)
    events.path = prepared.out / "events.jsonl"
    found = Found(work / "attacked", _yardsticks(prepared))
    if not prepared.settings.fresh:
        _recall(prepared, found)
    for subject, source in prepared.sources.items():
        if _complete(subject, prepared, found) and (subject != "base" or _controls_complete(prepared, found)):
            continue
        with events.stage(f"load {subject}"):
            loaded = load_model(source, prepared.device, prepared.dtype)
        material = Material.of(
            prepared.concept, prepared.facts, loaded.tokenizer, prepared.questions, prepared.settings.seed,
            prepared.sources["base"].folder,
        )  # fmt: skip
        _attack(subject, loaded, material, prepared, found, work, events)
        if subject == "base":
            _attack_controls(loaded, material, prepared, found, work, events)
        del loaded
        gc.collect()
    results = _conclude(prepared, found)
    write_whole(prepared.out / "audit.json", json.dumps(results, indent=1))
    audit_report.write_report(prepared.out / "report.html", results)
    audit_report.write_card(prepared.out, results)
    if prepared.settings.card:
        folder = prepared.sources["edited"].folder
        audit_report.amend_card(folder, results)
        if (beside := folder.parent / "report.html").is_file():
            report.report_of(folder, beside)
    shutil.rmtree(work)
    return results


def _attack(
    subject: str, loaded: LoadedModel, material: Material, prepared: Prepared, found: Found, work: Path, events: Events
) -> None:  # fmt: skip
    """All attacks on one model; those that are kept already are not made again."""
    model, budget = loaded.model, prepared.budget
    if not found.has(subject, UNTOUCHED):
        found.put(subject, UNTOUCHED, Trained.once(material.exam.hits(model)))
    others = _others(prepared, subject)
    if others and not found.has(subject, UTILITY):
        found.put(subject, UTILITY, Trained.once(Exam(loaded.tokenizer, others).hits(model)))
    plain = [name for name in prepared.attacks if ATTACKS[name].score and not found.has(subject, name)]
    if plain:
        with events.stage(f"question {subject}", len(plain)) as stage:
            for name in plain:
                found.put(subject, name, Trained({0.0: untrained(model, ATTACKS[name], material)}, 0))
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


def _yardsticks(prepared: Prepared) -> KeptTensors:
    """Earlier audits' curves of base and controls, by everything that they depend on."""
    scopes = [
        scope_of(prepared.sources[name].folder, prepared.dtype, prepared.device)
        for name in ("base", "never") if name in prepared.sources
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
    return KeptTensors(cache_folder() / "audits", repr(about))


def _recall(prepared: Prepared, found: Found) -> None:
    """Take over what an earlier audit found of the yardsticks."""
    for subject in YARDSTICKS:
        attacks = (_for_hidden(prepared) if subject == "suppressed" else prepared).attacks
        for name in (UNTOUCHED, UTILITY, *(name for name in attacks if ATTACKS[name].score)):
            found.recall(subject, name)
        for names in _groups(attacks):
            for name in names:
                found.recall(subject, name, names)


def _complete(subject: str, prepared: Prepared, found: Found) -> bool:
    return found.has(subject, UNTOUCHED, *([UTILITY] if _others(prepared, subject) else []), *prepared.attacks)


def _attack_controls(
    loaded: LoadedModel, material: Material, prepared: Prepared, found: Found, work: Path, events: Events
) -> None:
    """A model that merely hides its knowledge; and, without a model that never knew, the base on facts nobody knows."""
    hidden = _for_hidden(prepared)
    if hidden.attacks and not _complete("suppressed", hidden, found):
        with _hidden(loaded, material, prepared, work, events):
            _attack("suppressed", loaded, material, hidden, found, work, events)
    if "never" in prepared.sources or _complete("never", prepared, found):
        return
    facts, questions = novel_facts(prepared.facts, prepared.concept.questions, prepared.settings.seed)
    asked = tuple(q for q in questions if q.split == "forget")
    concept = replace(
        prepared.concept,
        questions=(*asked, *(q for q in prepared.concept.questions if q.split != "forget")),
        forget=_retold(facts, prepared.concept),
    )
    tested = [q for q in asked if q.group == "V"][: len(prepared.questions)]
    novel = Material.of(concept, facts, loaded.tokenizer, tested, prepared.settings.seed, material.base)
    _attack("never", loaded, novel, prepared, found, work, events)


def _for_hidden(prepared: Prepared) -> Prepared:
    """The attacks that a model which hides its knowledge is put to: those that fine-tune it on the concept."""
    names = (name for name in prepared.attacks if ATTACKS[name].tier == 2 and ATTACKS[name].method == "lora")
    return replace(prepared, attacks=tuple(name for name in names if ATTACKS[name].data in ("T", "V")))


def _controls_complete(prepared: Prepared, found: Found) -> bool:
    hidden = _for_hidden(prepared)
    floor = "never" in prepared.sources or _complete("never", prepared, found)
    return floor and (not hidden.attacks or _complete("suppressed", hidden, found))


@contextmanager
def _hidden(loaded: LoadedModel, material: Material, prepared: Prepared, work: Path, events: Events) -> Iterator[None]:
    """The base with a small update of its last layer that gives wrong answers: all it knew is still below."""
    config = loaded.model.config.to_dict()
    modules = adapter_modules(loaded.model, architecture_of(config), [layer_count(config) - 1])
    with low_rank_attackers(loaded.model, modules, 8, 16.0, [prepared.settings.seed]) as attackers:
        with events.stage("make a model that hides it") as stage:
            hide(loaded.model, attackers, material, prepared.settings.seed, stage, work)
        yield


def _conclude(prepared: Prepared, found: Found) -> dict[str, Any]:
    compared, gaps = [], list(prepared.gaps)
    utility = {
        subject: found.get(subject, UTILITY).by_rate[0.0].hits.ravel().tolist()
        for subject in prepared.sources if found.has(subject, UTILITY)
    }  # fmt: skip
    base = found.get("base", UNTOUCHED).by_rate[0.0]
    exam_chance = sum(1 / len(q.choices) for q in prepared.questions) / len(prepared.questions)
    scale = Scale(exam_chance, float(base.accuracy[0]))
    for name in prepared.attacks:
        results = {subject: found.get(subject, name) for subject in ("base", "edited", "never")}
        control = found.get("suppressed", name) if found.has("suppressed", name) else None
        chosen = {subject: furthest(result.by_rate) for subject, result in results.items()}
        if any(np.isnan(attacked.hits).any() for _, attacked in chosen.values()):
            gaps.append(f"{name} found too few questions to score; it is left out")
            continue
        compared.append(Compared(
            name, ATTACKS[name].tier, ATTACKS[name].known, chosen["base"][1], chosen["edited"][1], _matched(chosen["never"][1], base),
            furthest(control.by_rate)[1] if control else None,
            {subject: rate for subject, (rate, _) in chosen.items()}, sum(result.diverged for result in results.values()),
        ))  # fmt: skip
    asked_floor = found.get("never", UNTOUCHED).by_rate[0.0].hits.shape[2]
    if asked_floor != len(prepared.questions):
        gaps.append(f"the floor could be asked {asked_floor} questions, the other models {len(prepared.questions)}")
    floor_kind = "the model that never knew" if "never" in prepared.sources else f"the base, on {NOVEL},"
    kept = tuple(sum(hits) / len(hits) for hits in (utility.get("base"), utility.get("edited")) if hits)
    if len(kept) < 2:
        gaps.append("the concept pack asks about nothing else, so nothing says whether the model still works")
    judged = judge(compared, scale, (kept[0], kept[1]) if len(kept) == 2 else None, floor_kind)
    return {
        "schema_version": SCHEMA_VERSION, "verdict": judged.verdict, "reasons": judged.reasons,
        "speed_up": {**judged.speed_up.describe(), "share": judged.share},
        "controls": {**judged.controls, "floor_is": "never" if "never" in prepared.sources else NOVEL},
        "attacks": [one.describe(scale) | {"about": ATTACKS[one.name].about} for one in compared],
        "untouched": {s: float(found.get(s, UNTOUCHED).by_rate[0.0].accuracy[0]) for s in ("base", "edited", "never")},
        "utility": {
            name: {"value": sum(hits) / len(hits), "n": len(hits), "ci95": wilson(int(sum(hits)), len(hits))}
            for name, hits in utility.items()
        },
        "n": len(prepared.questions), "gaps": gaps, "recalled": found.recalled(), "command": _command(prepared),
        "concept": {"ref": prepared.concept.ref, "name": prepared.concept.about.name, "sha256": prepared.concept.sha256},
        "models": {name: source.describe() for name, source in prepared.sources.items()},
        "settings": prepared.settings.model_dump(mode="json", exclude={"out", "model", "base", "never", "concept", "card", "fresh"})
        | {"steps": prepared.budget.steps, "batch": prepared.budget.batch, "seeds": prepared.budget.seeds},
    }  # fmt: skip


def _command(prepared: Prepared) -> str:
    """The command that makes the audit again; models as they are published, never a local path."""
    settings, sources = prepared.settings, prepared.sources
    words = [
        "excise",
        "audit",
        sources["edited"].reference,
        "--concept",
        prepared.concept.ref,
        "--base",
        sources["base"].reference,
    ]
    if "never" in sources:
        words += ["--never", sources["never"].reference]
    words += ["--budget", settings.budget, "--seed", str(settings.seed)]
    if settings.attacks:
        words += ["--attacks", ",".join(settings.attacks)]
    if settings.questions:
        words += ["--questions", str(settings.questions)]
    return " ".join(words)


def _matched(floor: Attacked, base: Attacked) -> Attacked:
    """A floor on other questions is paired with as many of its own."""
    n, wanted = floor.hits.shape[2], base.hits.shape[2]
    if n == wanted:
        return floor
    places = np.resize(np.arange(n), wanted)
    return Attacked(floor.steps, floor.tokens, floor.hits[:, :, places])


def _others(prepared: Prepared, subject: str) -> list[Question]:
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


def _check_concept(concept: Concept, questions: Sequence[Question], facts: Facts) -> None:
    if concept.about.kind != "knowledge":
        raise RequestError(
            f"concept {concept.ref} is a behaviour; an audit asks questions of group V, so give a concept of kind knowledge"
        )
    if len(questions) < FEWEST:
        raise RequestError(
            f"concept {concept.ref} has {len(questions)} forget questions of group V; an interval of ±0.10 needs "
            f"{questions_needed(0.1)}, and {FEWEST} is the least that is audited"
        )
    if not any(fact.group == "V" for fact in facts.facts) or not any(fact.group == "T" for fact in facts.facts):
        raise RequestError(
            f"concept {concept.ref} states no facts of both groups that could be found; its forget texts must hold "
            "subjects and answers of group-T questions, and texts on group V in the same words"
        )
    tested = {q.subject for q in questions if q.subject}
    seen = [text.id for text in concept.forget if text.group == "T" and any(subject in text.text for subject in tested)]
    if seen:
        raise RequestError(
            f"{len(seen)} texts of group T of concept {concept.ref} name subjects of group V (the first is {seen[0]}), so an "
            "attacker would see what is measured; move them to group V"
        )


def _check_descent(name: str, source: ModelSource, found: Checkpoint, base: ModelSource, wanted: Checkpoint) -> None:
    """Shapes and vocabulary must be the base's."""
    if name == "base":
        return
    shapes, theirs = ({t.name: t.shape for t in c.tensors.values()} for c in (found, wanted))
    different = [key for key in shapes if key in theirs and shapes[key] != theirs[key]]
    different += sorted(set(shapes) ^ set(theirs) - {"lm_head.weight"})
    different = [key for key in different if key != "lm_head.weight"]
    if different:
        raise RequestError(
            f"{source.name} does not descend from {base.name}: {len(different)} tensors differ in shape or name, the first is "
            f"{different[0]}; give the base that it was made from"
        )
    if load_tokenizer(source).get_vocab() != load_tokenizer(base).get_vocab():
        raise RequestError(f"{source.name} has another tokenizer than {base.name}; give the base that it was made from")


def _affordable(
    attacks: Sequence[str], checkpoint: Checkpoint, device: torch.device
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Attacks that fit into memory, and what is left out: all weights take their gradient, two moments and a copy."""
    need, free = memory_for_whole_weights(checkpoint, device)
    full = [name for name in attacks if ATTACKS[name].method == "full"]
    if not full or need <= free:
        return tuple(attacks), ()
    gap = f"{', '.join(full)} need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: fine-tuning of all weights was not tested"
    return tuple(name for name in attacks if name not in full), (gap,)


def _builtin_never(settings: AuditSettings) -> str | None:
    known = settings.base == "builtin:testbed" and settings.concept == "builtin:potions"
    return "builtin:testbed-never" if known and "testbed-never" in builtin_models() else None
