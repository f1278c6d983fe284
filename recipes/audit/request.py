"""What an audit is asked for, and whether it can be done at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field

from ...artifacts.checkpoints.adapter_config import AdapterConfig
from ...artifacts.checkpoints.manifest import verify_folder
from ...artifacts.checkpoints.read import Checkpoint, open_checkpoint
from ...artifacts.concepts import load_concept
from ...artifacts.models.adapter import recorded_base
from ...artifacts.models.dequantized import check_full_precision, check_loadable
from ...artifacts.models.find import find_adapter, find_model
from ...artifacts.models.load import choose_device, choose_dtype, load_tokenizer
from ...artifacts.models.placement import check_trainable
from ...artifacts.models.source import ModelSource, builtin_models
from ...editing.errors import RequestError, nearest
from ...eval.audit.recovery import questions_needed
from ...eval.concept import Concept, Question
from ...eval.drawing import drawn
from ...eval.items import clusters_of, unseen
from ..common.run_folder import RunSettings, free_folder, refuse_taken
from ..common.run_record import inputs_of
from ..common.whole_weights import Optimizer, whole_weights
from ..data.facts import Facts, find_facts
from .attacks.table import ATTACKS, BUDGETS, Budget, Kind
from .behaviours.items import BehaviourItems, items_of
from .gaps import without_gaps
from .held_apart import held_apart
from .notes import notes_on, teaches_questions
from .novel_questions import NovelPack, novel_pack

FEWEST = 20
"""Questions of group V below which no audit is made."""
OTHER_QUESTIONS = 200
"""Questions on everything else that show whether the model still works, at most."""
STATED = 0.5
"""Share of the questions whose facts a pack's texts must state for these texts to be read as facts."""
NOVEL = "facts that nobody knows"
GUESSING = "guessing"
ELSEWHERE = "prompts without the concept"
"""Where the base learns a behaviour that it does not show there."""
UNTAUGHT = "the base, which was never taught it"
MADE_FROM_BASE = (NOVEL, ELSEWHERE, UNTAUGHT)
"""Floors for which no other model is loaded."""


class AuditSettings(RunSettings):
    """What to audit, against what, and how hard."""

    model: str
    """Model to audit: a run's folder, a checkpoint, a Hub id with optional @revision, or builtin:NAME."""
    concept: str = "builtin:potions"
    """Concept pack of the knowledge or behaviour that the edit should have removed: builtin:NAME or a folder. A run names
    its own."""
    base: str = "builtin:testbed"
    """Model that the edited one was made from: a folder, a Hub id or builtin:NAME. A run names its own."""
    reference: str | None = None
    """A model that was never trained on the concept. Without one, the base learns made-up facts, or a behaviour where it does
    not show it, for comparison. A run names its own."""
    attacks: tuple[str, ...] = ()
    """Names of attacks to run, such as [rtt, few_shot]; empty runs those of the budget."""
    budget: Literal["quick", "standard", "long"] = "quick"
    """Attacks and steps: quick takes minutes, standard tens of minutes, long hours."""
    questions: int = Field(0, ge=0)
    """Most questions of group V (held out) to ask, drawn at random; 0 asks all, and of a behaviour as many prompts as the
    budget says. More narrow the intervals."""
    locked: bool | None = None
    """Whether a second control that knows the concept is attacked too: the base, trained to answer rightly only after a
    password. Empty: in a standard or long audit of knowledge."""
    removed: bool | None = None
    """Whether a control whose knowledge is surely gone is attacked too: the reference, taught the concept in known weights,
    which are then taken out. Empty: in a standard or long audit of knowledge."""
    card: bool = False
    """Also write the audit into the checkpoint that excise made: a section of its card, and audit.json."""
    fresh: bool = False
    """Attack base and controls again instead of reusing an earlier audit's curves of them."""

    def completed(self) -> Self:
        """Concept, base, reference and how prompts are rendered, from the record of the run that made the model."""
        unset, adapter = {"concept", "base", "reference"} - self.model_fields_set, find_adapter(self.model)
        run = None if adapter else inputs_of(self.model)
        rendered = {} if run is None else {k: v for k, v in run.prompts.items() if k not in self.model_fields_set}
        if unset <= {"reference"}:
            return self.model_copy(update=rendered)
        if "base" in unset and adapter:
            base = recorded_base(adapter, AdapterConfig(adapter.folder, adapter.name))
            return self.model_copy(update={"base": base}).completed()
        if run is None:
            if "base" not in unset:
                raise RequestError(f"{self.model} has no record of a run that names its concept; give --concept")
            return self
        recorded = {key: run.reference if key == "reference" else run.known(key) for key in sorted(unset)}
        return self.model_copy(update={**rendered, **recorded})


@dataclass(frozen=True)
class AuditJob:
    """A checked request."""

    settings: AuditSettings
    sources: Mapping[str, ModelSource]
    """By subject: base, edited, and reference where there is one."""
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
    novel: NovelPack | None = None
    """Questions that nobody can answer, where neither a reference nor the pack's facts give a floor."""
    notes: tuple[str, ...] = ()
    """What of the pack is asked and read, where that is not what its files say."""
    optimizer: Optimizer = "adamw"
    """How attackers that train all weights keep the moments of AdamW."""
    behaviour: BehaviourItems | None = None
    """What is asked and read of a behaviour; None where knowledge is audited."""

    @property
    def kind(self) -> Kind:
        """What may come back."""
        return "behaviour" if self.behaviour else "knowledge"

    @property
    def reference(self) -> str:
        """What the edited model is compared with: the model ``reference``, novel facts, or guessing; of a behaviour the base
        where it does not show it, or before it was taught."""
        if "reference" in self.sources:
            return "reference"
        if self.behaviour:
            return UNTAUGHT if self.behaviour.kept_out else ELSEWHERE
        return NOVEL if self.facts.facts or self.novel else GUESSING

    @property
    def suppressed_attacks(self) -> tuple[str, ...]:
        """The attacks that the suppressed control is put to: those that fine-tune it on the concept.

        One that teaches the very questions would bring any answer back, and shows nothing of what attacks can recover.
        """
        if self.behaviour:
            return tuple(name for name in self.attacks if ATTACKS[name].sources == ("pairs",))
        data = ("T",) if teaches_questions(self.concept) else ("T", "V")
        rows = ((name, ATTACKS[name]) for name in self.attacks)
        return tuple(name for name, row in rows if row.method == "low_rank" and row.data in data and not row.searched)

    @property
    def wants_locked(self) -> bool:
        """Whether there is to be a password-locked control."""
        wanted = self.budget.locked if self.settings.locked is None else self.settings.locked
        return wanted and not self.behaviour

    @property
    def locked_attacks(self) -> tuple[str, ...]:
        """The attacks that it is put to: those of the suppressed control that do not see group V, because the others
        teach what was locked. Without any it is not made."""
        return self._without_v if self.wants_locked else ()

    @property
    def wants_removed(self) -> bool:
        """Whether there is to be a removal control."""
        wanted = self.budget.removed if self.settings.removed is None else self.settings.removed
        return wanted and not self.behaviour

    @property
    def removed_attacks(self) -> tuple[str, ...]:
        """The attacks that it is put to: those of the password-locked control. It is made of the floor, so guessing has
        none."""
        return self._without_v if self.wants_removed and self.reference != GUESSING else ()

    @property
    def _without_v(self) -> tuple[str, ...]:
        return tuple(name for name in self.suppressed_attacks if not ATTACKS[name].known)


def prepare(settings: AuditSettings, *, resume: bool = False) -> AuditJob:
    """Check names, files, memory and whether the models belong together, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    settings = settings.completed()
    concept = load_concept(settings.concept)
    if concept.about.kind != "knowledge":
        return _behaviour_job(settings, concept, resume)
    apart = held_apart(concept)
    concept = apart.concept
    questions = tuple(
        drawn(apart.questions, clusters_of(concept, apart.questions), settings.questions, f"audit {settings.seed}")
    )
    _check_count(concept, questions)
    facts = _stated_facts(concept, apart.questions)
    attacks = settings.attacks or BUDGETS[settings.budget].attacks
    _check_attacks(attacks, "knowledge", concept)
    attacks, gaps = without_gaps(attacks, concept, questions, facts)
    if not attacks:
        raise RequestError(f"nothing to attack with in concept {concept.ref}: {'; '.join(gaps)}")
    models = _models(settings, resume)
    attacks, costly, optimizer, told = _affordable(attacks, models.checkpoints["base"], models.device)
    novel = None
    if "reference" not in models.sources and not facts.facts:
        novel = novel_pack(concept, questions, FEWEST, settings.seed)
    return AuditJob(
        settings,
        models.sources,
        concept,
        facts,
        questions,
        attacks,
        BUDGETS[settings.budget],
        models.device,
        models.dtype,
        models.out,
        (*gaps, *costly),
        novel,
        (*apart.notes, *notes_on(concept, questions, attacks), *told),
        optimizer,
    )


def _behaviour_job(settings: AuditSettings, concept: Concept, resume: bool) -> AuditJob:
    """The same of a pack whose concept is a behaviour, or a task that teaches one unintentionally."""
    budget = BUDGETS[settings.budget]
    items = items_of(concept, settings.questions or budget.prompts, budget.other_prompts, settings.seed)
    attacks = settings.attacks or budget.behaviour
    _check_attacks(attacks, "behaviour", concept)
    gaps: tuple[str, ...] = ()
    if not concept.contrast and "add_direction" in attacks:
        attacks = tuple(name for name in attacks if name != "add_direction")
        gaps = ("add_direction: needs contrast pairs; add contrast.jsonl",)
    for wanted, name in ((settings.locked, "password-locked control"), (settings.removed, "removal control")):
        if wanted:
            gaps = (*gaps, f"{name}: is made in audits of knowledge alone")
    models = _models(settings, resume)
    attacks, costly, optimizer, told = _affordable(attacks, models.checkpoints["base"], models.device)
    return AuditJob(
        settings,
        models.sources,
        concept,
        Facts((), {}),
        (),
        attacks,
        budget,
        models.device,
        models.dtype,
        models.out,
        (*gaps, *costly),
        notes=told,
        optimizer=optimizer,
        behaviour=items,
    )


@dataclass(frozen=True)
class _Models:
    sources: dict[str, ModelSource]
    checkpoints: dict[str, Checkpoint]
    device: torch.device
    dtype: torch.dtype
    out: Path


def _models(settings: AuditSettings, resume: bool) -> _Models:
    """Find the models and check that they belong together."""
    out = settings.out or free_folder("audit")
    if not resume:
        refuse_taken(out)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    sources = _sources(settings)
    checkpoints = {name: open_checkpoint(source.folder) for name, source in sources.items()}
    for name, source in sources.items():
        # Attacks train weights and compare them with the base's, tensor by tensor.
        check_full_precision(checkpoints[name], source.name)
        check_loadable(checkpoints[name], device, dtype)
        check_trainable(checkpoints[name], device, dtype)
        # Attacks that undo the edit read the base's tensors under the names and shapes of the edited model.
        if name != "base":
            _check_same_tensors(source, checkpoints[name], sources["base"], checkpoints["base"])
            _check_same_tokenizer(source, sources["base"])
    if settings.card:
        verify_folder(sources["edited"].folder)
    return _Models(sources, checkpoints, device, dtype, out)


def other_questions(concept: Concept) -> list[Question]:
    """Questions on everything else that show whether the model still works, and that no training sees; drawn at random over
    subjects."""
    others = unseen([q for q in concept.questions if q.split != "forget"])
    return drawn(others, clusters_of(concept, others), OTHER_QUESTIONS, "audit utility")


def questions_at_looks(concept: Concept, most: int) -> list[Question]:
    """Those of ``other_questions`` that are asked while a model is attacked: at most so many, half of them on neighbours,
    where there are enough of both."""
    others = other_questions(concept)
    near = [q for q in others if q.split == "neighbour"]
    far = [q for q in others if q.split != "neighbour"]
    of_near = min(len(near), max(most // 2, most - len(far)))
    counts = ((near, of_near), (far, min(len(far), most - of_near)))
    return [q for some, n in counts if n for q in drawn(some, clusters_of(concept, some), n, "audit looks")]


def format_questions(job: AuditJob, questions: Sequence[Question]) -> tuple[Question, ...]:
    """Those of group V that are asked in several formats, drawn at random over subjects."""
    clusters = clusters_of(job.concept, questions)
    return tuple(drawn(questions, clusters, job.budget.formats, "audit formats"))


def _sources(settings: AuditSettings) -> dict[str, ModelSource]:
    sources = {"base": find_model(settings.base), "edited": find_model(settings.model, settings.base)}
    if reference := settings.reference or _builtin_reference(settings):
        sources["reference"] = find_model(reference)
    if sources["base"].folder == sources["edited"].folder:
        raise RequestError(
            f"{settings.model} is also the base of this audit, so nothing was edited; give an edited model, or another"
            " --base"
        )
    return sources


def _builtin_reference(settings: AuditSettings) -> str | None:
    known = settings.base == "builtin:testbed" and settings.concept == "builtin:potions"
    return "builtin:testbed-reference" if known and "testbed-reference" in builtin_models() else None


def _check_attacks(attacks: Sequence[str], kind: Kind, concept: Concept) -> None:
    allowed = [name for name, row in ATTACKS.items() if kind in row.kinds]
    if unknown := [name for name in attacks if name not in ATTACKS]:
        raise RequestError(f"no attack {unknown[0]!r}{nearest(unknown[0], allowed)}; attacks: {', '.join(allowed)}")
    if others := [name for name in attacks if name not in allowed]:
        raise RequestError(
            f"{others[0]} is no attack on a {kind if kind == 'behaviour' else 'piece of knowledge'}, which concept"
            f" {concept.ref} (kind {concept.about.kind}) is about; attacks: {', '.join(allowed)}"
        )


def _check_count(concept: Concept, questions: Sequence[Question]) -> None:
    if len(questions) < FEWEST:
        texts = (
            "" if any(q.split == "forget" for q in concept.questions) else " (texts of which four or more are alike)"
        )
        raise RequestError(
            f"concept {concept.ref} has {len(questions)} forget questions of group V (held out); an audit needs at"
            f" least {FEWEST}, and an interval of ±0.10 needs {questions_needed(0.1)}; add questions{texts} to the pack,"
            " or raise --questions"
        )


def _stated_facts(concept: Concept, questions: Sequence[Question]) -> Facts:
    """Facts that the pack's texts state in the frames of their relation; none where that is too few of what is asked."""
    facts = find_facts(concept)
    stated = {(fact.subject, fact.answer) for fact in facts.facts if fact.group == "V"}
    count = sum((q.subject, q.choices[q.answer]) in stated for q in questions)
    enough = any(fact.group == "T" for fact in facts.facts) and count >= STATED * len(questions)
    return facts if enough else Facts((), {})


def _check_same_tensors(source: ModelSource, checkpoint: Checkpoint, base: ModelSource, of_base: Checkpoint) -> None:
    """Names and shapes must be the base's; an unembedding may be tied in one and not in the other."""
    shapes, expected = ({t.name: t.shape for t in c.tensors.values()} for c in (checkpoint, of_base))
    different = [name for name in shapes if name in expected and shapes[name] != expected[name]]
    different += sorted(set(shapes) ^ set(expected))
    different = [name for name in different if name != "lm_head.weight"]
    if different:
        raise RequestError(
            f"{source.name} does not descend from {base.name}: {len(different)} tensors differ in shape or name, the"
            f" first is {different[0]}; give the base that it was made from"
        )


def _check_same_tokenizer(source: ModelSource, base: ModelSource) -> None:
    if load_tokenizer(source).get_vocab() != load_tokenizer(base).get_vocab():
        raise RequestError(f"{source.name} has another tokenizer than {base.name}; give the base that it was made from")


def _affordable(
    attacks: Sequence[str], checkpoint: Checkpoint, device: torch.device
) -> tuple[tuple[str, ...], tuple[str, ...], Optimizer, tuple[str, ...]]:
    """Attacks that fit into memory, what is left out, the optimizer of those that train all weights, and what is to be
    said of it."""
    room = whole_weights(checkpoint, device)
    whole = [name for name in attacks if ATTACKS[name].whole]
    if not whole:
        return tuple(attacks), (), "adamw", ()
    if room.fits:
        return tuple(attacks), (), room.optimizer, (room.sentence,) if room.sentence else ()
    gap = f"{', '.join(whole)}: fine-tuning of all weights {room.missing}"
    return tuple(name for name in attacks if name not in whole), (gap,), "adamw", ()
