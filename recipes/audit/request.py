"""What an audit is asked: the models, the attacks, and whether they can be run at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ...artifacts.checkpoints.manifest import verify_folder
from ...artifacts.checkpoints.read import Checkpoint, open_checkpoint
from ...artifacts.concepts import load_concept
from ...artifacts.models.find import find_model
from ...artifacts.models.load import choose_device, choose_dtype, load_tokenizer
from ...artifacts.models.memory import check_memory
from ...artifacts.models.source import ModelSource, builtin_models
from ...editing.errors import RequestError, nearest
from ...eval.audit.recovery import questions_needed
from ...eval.concept import Concept, Question
from ..common.examples import spread
from ..common.run_folder import RunSettings, free_folder, refuse_taken
from ..common.trainer import memory_for_whole_weights
from ..data.facts import Facts, find_facts
from .attackers import Budget
from .attacks.table import ATTACKS, BUDGETS

FEWEST = 20
"""Questions of group V below which no audit is made."""
NOVEL = "facts that nobody knows"


class AuditSettings(RunSettings):
    """What to audit, against what, and how hard."""

    model: str
    """Model to audit: any, edited here or elsewhere."""
    concept: str = "builtin:potions"
    """Concept pack that the edit was to remove: builtin:NAME or a folder."""
    base: str = "builtin:testbed"
    """The model it was made from."""
    reference: str | None = None
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
class AuditJob:
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


def prepare(settings: AuditSettings, *, resume: bool = False) -> AuditJob:
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
    reference = settings.reference or _builtin_reference(settings)
    if reference:
        sources["reference"] = find_model(reference)
    checkpoints = {name: open_checkpoint(source.folder) for name, source in sources.items()}
    for name, source in sources.items():
        check_memory(checkpoints[name], device, dtype)
        _check_descent(name, source, checkpoints[name], base, checkpoints["base"])
    if settings.card:
        verify_folder(sources["edited"].folder)
    kept, gaps = _affordable(attacks, checkpoints["base"], device)
    return AuditJob(settings, sources, concept, facts, questions, kept, budget, device, dtype, out, gaps)


def describe(prepared: AuditJob) -> dict[str, Any]:
    """What an audit would do."""
    budget = prepared.budget
    training = [name for name in prepared.attacks if not ATTACKS[name].score]
    return {
        "recipe": "audit", "out": str(prepared.out), "models": {name: s.name for name, s in prepared.sources.items()},
        "floor": "reference" if "reference" in prepared.sources else NOVEL, "questions": len(prepared.questions),
        "attacks": list(prepared.attacks), "attackers_that_train": sum(
            budget.seeds * len(budget.rates[ATTACKS[name].method]) for name in training
        ) * 4, "steps_each": budget.steps, "gaps": list(prepared.gaps),
    }  # fmt: skip


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


def _builtin_reference(settings: AuditSettings) -> str | None:
    known = settings.base == "builtin:testbed" and settings.concept == "builtin:potions"
    return "builtin:testbed-reference" if known and "testbed-reference" in builtin_models() else None
