"""An audit at work: which attacks on which model are done, and the next one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.tensor_cache import TensorCache, scope_of
from ...artifacts.events import Events
from ...artifacts.models.cache import cache_folder
from ...artifacts.models.load import LoadedModel, load_model
from ...artifacts.runs import CURVES
from ...artifacts.upgrade import SCHEMA_VERSION
from ...editing.training.packing import packing
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.run_folder import start_folder
from ..common.run_inputs import checksums
from .attack_data import Answers, AttackData, FormatAsking
from .attackers import AttackTraining
from .attacks.table import ATTACKS
from .behaviours.data import BehaviourData
from .curve_store import CONTROLS, OPENED, TAUGHT, UNTOUCHED, UTILITY, AttackCurves, CurveStore, code_digest, one_point
from .floor import floor_questions, invented_facts
from .formats import FormatQuestions
from .locked_control import locked_control
from .more_controls import lock_of, removal_of
from .novel_facts import novel_concept
from .parts import PARTS, UNTRAINED, Part, by_method
from .removal_control import removal_control
from .request import MADE_FROM_BASE, AuditJob, format_questions, other_questions, questions_at_looks
from .suppressed_control import suppressed_control

WATCHED = ("base", "edited")
"""Subjects that are asked about everything else too while they are attacked."""


@dataclass(frozen=True)
class Target:
    """A model under attack."""

    subject: str
    """base, edited, suppressed, locked, removed or reference."""
    model: Any
    data: AttackData | BehaviourData
    attacks: tuple[str, ...]


class AuditRun:
    """One audit: its job, the curves so far, and where progress goes."""

    def __init__(self, job: AuditJob, events: Events, part: Part | None = None):
        """``part`` is all that is attacked here, beside other processes in the same folder; by default everything is. A
        worker is given one part after the other."""
        self.job, self.events, self.part = job, events, part
        models = {f"the {name} model": source for name, source in job.sources.items()}
        inputs = checksums(job.settings, models, job.concept)
        self.work: Path = start_folder(job.out, "audit", job.settings, inputs, alone=part is None)
        self.curves = CurveStore(self.work / CURVES, _earlier_curves(job))
        self.scratch = self.work / PARTS / part.name if part else self.work
        """For the trainer's files."""
        events.path = part.events(self.work) if part else job.out / "events.jsonl"
        events.path.parent.mkdir(exist_ok=True)

    def reuse_earlier_curves(self) -> None:
        """Take over what earlier audits measured of base and controls."""
        for subject in CONTROLS:
            attacks = self._attacks_on(subject)
            for name in (UNTOUCHED, UTILITY, OPENED, TAUGHT, *(name for name in attacks if not ATTACKS[name].trains)):
                self.curves.reuse(subject, name)
            # Curves of attacks that trained side by side depend on each other's rounding, so they are reused together
            # only.
            for names in by_method(attacks):
                for name in names:
                    self.curves.reuse(subject, name, self._beside(names))

    def _attacks_on(self, subject: str) -> tuple[str, ...]:
        job = self.job
        made = {"suppressed": job.suppressed_attacks, "locked": job.locked_attacks, "removed": job.removed_attacks}
        return made.get(subject, job.attacks)

    def _beside(self, names: Sequence[str]) -> tuple[str, ...]:
        """What curves of attacks depend on: who trained side by side, and states of an optimizer that are not in full."""
        whole = any(ATTACKS[name].whole for name in names)
        return (*names, *((self.job.optimizer,) if whole and self.job.optimizer != "adamw" else ()))

    def is_complete(self, subject: str) -> bool:
        """Whether a model need not be loaded; controls that are made from the base count with it."""
        complete = self._has(subject, self.job.attacks)
        controls = {"base": [self.suppressed_is_complete, self.locked_is_complete, self.reference_is_complete]}
        controls.setdefault("reference" if "reference" in self.job.sources else "base", []).append(
            self.removed_is_complete
        )
        return complete and all(is_complete() for is_complete in controls.get(subject, []))

    def load(self, subject: str) -> Target:
        """A model of the request, ready to be attacked."""
        job = self.job
        loaded = self.loaded(subject)
        base = job.sources["base"].folder
        others = questions_at_looks(job.concept, job.budget.others) if subject in WATCHED else []
        data = AttackData(
            job.concept,
            job.facts,
            job.questions,
            loaded.tokenizer,
            job.settings.seed,
            base,
            job.sources[subject].folder,
            tuple(others),
        )
        if subject != "base":
            data = self._with_formats(data)
        return Target(subject, loaded.model, data, job.attacks)

    def loaded(self, subject: str) -> LoadedModel:
        """A model of the request, in evaluation mode."""
        job = self.job
        with self.events.stage(f"load {subject}"):
            return load_model(job.sources[subject], job.device, job.dtype, prompts=job.settings.prompt_format())

    def attack(self, target: Target) -> None:
        """All attacks on one model, or those of this process's part; curves that are there already are not made again."""
        # What questions begin with is read once for all of them, where the model can.
        with packing(target.model):
            self._attack(target)

    def _attack(self, target: Target) -> None:
        if self._wants(target.subject, UNTRAINED):
            with self.curves.claimed(target.subject, UNTRAINED):
                self._measure_untouched(target)
                self._attack_without_training(target)
        for names in by_method(target.attacks):
            method = ATTACKS[names[0]].method
            if self._wants(target.subject, method) and not self.curves.has(target.subject, *names):
                with self.curves.claimed(target.subject, method):
                    # Looked for only now: another process may have made them while this one waited.
                    missing = [name for name in names if not self.curves.has(target.subject, name)]
                    if missing:
                        self._train_attackers(target, missing)

    def attack_suppressed_control(self, base: Target) -> None:
        """The base, trained to answer wrongly: attacks that fine-tune must bring its knowledge back."""
        if self.suppressed_is_complete() or not self.wants("suppressed"):
            return
        assert isinstance(base.data, AttackData)
        with suppressed_control(base.model, base.data, self.events, self.scratch / "suppressed"):
            data = replace(base.data, others=())
            self.attack(replace(base, subject="suppressed", data=data, attacks=self.job.suppressed_attacks))

    def attack_locked_control(self, base: Target) -> None:
        """The base, trained to answer rightly only after a password: attacks without it must bring its knowledge back."""
        if self.locked_is_complete() or not self.wants("locked"):
            return
        assert isinstance(base.data, AttackData)
        with locked_control(base.model, base.data, base.data.others, self.events, self.scratch / "locked") as lock:
            rest = {UTILITY: lock.others[1]} if lock.others else {}
            for name, curve in {UNTOUCHED: lock.closed, OPENED: lock.opened, **rest}.items():
                self.curves.put("locked", name, AttackCurves({0.0: curve}, 0))
            # One that is not locked would show nothing.
            attacks = () if lock.problem else self.job.locked_attacks
            self.attack(replace(base, subject="locked", data=replace(base.data, others=()), attacks=attacks))

    def attack_novel_facts(self, base: Target) -> None:
        """Without a model that never knew the concept: the base, attacked about facts that nobody knows."""
        if self.job.reference not in MADE_FROM_BASE:
            return
        assert isinstance(base.data, AttackData)
        job = self.job
        if job.novel:
            data = replace(base.data, concept=job.novel.concept, questions=job.novel.questions, others=())
        else:
            facts, forget = invented_facts(job)
            concept, held_out = novel_concept(job.concept, facts, forget), floor_questions(job)
            data = replace(base.data, concept=concept, facts=facts, questions=held_out, others=())
        floor = replace(base, subject="reference", data=self._with_formats(data))
        if not self.reference_is_complete():
            self.attack(floor)
        self.attack_removal_control(floor)

    def attack_removal_control(self, floor: Target) -> None:
        """The model that never knew, taught the concept in known weights, which are then taken out: attacks must find
        nothing."""
        if self.removed_is_complete() or not self.wants("removed"):
            return
        assert isinstance(floor.data, AttackData)
        others = questions_at_looks(self.job.concept, self.job.budget.others)
        with removal_control(floor.model, floor.data, others, self.events, self.scratch / "removed") as removal:
            rest = {UTILITY: removal.others[1]} if removal.others else {}
            for name, curve in {UNTOUCHED: removal.left, TAUGHT: removal.taught, **rest}.items():
                self.curves.put("removed", name, AttackCurves({0.0: curve}, 0))
            # One that never learned it, or is broken, would show nothing.
            attacks = () if removal.problem else self.job.removed_attacks
            data = replace(floor.data, others=(), formats=None)
            self.attack(replace(floor, subject="removed", data=data, attacks=attacks))

    def _with_formats(self, data: AttackData) -> AttackData:
        """The same data, with the questions that are asked in several formats."""
        return replace(data, formats=FormatQuestions(format_questions(self.job, data.questions), data.tokenizer))

    def _measure_untouched(self, target: Target) -> None:
        if not self.curves.has(target.subject, UNTOUCHED):
            hits = target.data.hits(target.model)
            # Attacks on the base are asked in one format alone: without an attack it shows which formats it can answer.
            formats = self._formats_of(target)
            asked = formats.ask(target.model) if formats else None
            self.curves.put(target.subject, UNTOUCHED, AttackCurves.of_one_point(hits, asked))
        others = self._other_questions(target.subject)
        if others and not self.curves.has(target.subject, UTILITY):
            if isinstance(target.data, BehaviourData):
                hits = target.data.utility_hits(target.model)
            else:
                hits = MultipleChoiceSet(target.data.tokenizer, others).hits(target.model)
            self.curves.put(target.subject, UTILITY, AttackCurves.of_one_point(hits))

    def _formats_of(self, target: Target) -> FormatAsking | None:
        """What the untouched model is asked beside."""
        if target.subject == "suppressed":
            return None
        if isinstance(target.data, BehaviourData):
            return target.data.in_formats(self.job.budget.formats)
        return self._with_formats(target.data).formats

    def _attack_without_training(self, target: Target) -> None:
        missing = [
            name for name in target.attacks if not ATTACKS[name].trains and not self.curves.has(target.subject, name)
        ]
        if missing:
            with self.events.stage(f"question {target.subject}", len(missing)) as stage:
                for name in missing:
                    answers = Answers.by_strength(ATTACKS[name].load()(target.model, target.data))
                    points = {strength: one_point(one.hits, one.utility) for strength, one in answers.items()}
                    self.curves.put(target.subject, name, AttackCurves(points, 0))
                    stage.advance()

    def _train_attackers(self, target: Target, names: Sequence[str]) -> None:
        """Attacks of one method, side by side."""
        budget = self.job.budget
        rows = {name: ATTACKS[name] for name in names}
        looks = sum(budget.looks_of(row, target.data.seed) for row in rows.values())
        with self.events.stage(f"attack {target.subject}: {', '.join(names)}", looks) as stage:
            folder = self.scratch / "attack"
            training = AttackTraining(target.model, target.data, budget, folder, self.job.optimizer)
            for name, curves in training.curves(rows, stage).items():
                self.curves.put(target.subject, name, curves, self._beside(names))

    def is_done(self, part: Part) -> bool:
        """Whether nothing of a part is left to do."""
        if part.subject == "suppressed":
            return self.suppressed_is_complete()
        if part.subject == "locked":
            return self.locked_is_complete()
        if part.subject == "removed":
            return self.removed_is_complete()
        attacks = [name for name in self.job.attacks if ATTACKS[name].trains == (part.method != UNTRAINED)]
        if part.method == UNTRAINED:
            return self._has(part.subject, attacks)
        return self.curves.has(part.subject, *(name for name in attacks if ATTACKS[name].method == part.method))

    def wants(self, *subjects: str) -> bool:
        """Whether this process attacks any of these."""
        return self.part is None or self.part.subject in subjects

    def _wants(self, subject: str, method: str) -> bool:
        return self.part is None or (self.part.subject == subject and self.part.method in ("", method))

    def suppressed_is_complete(self) -> bool:
        """Whether the suppressed control was put to all its attacks."""
        attacks = self.job.suppressed_attacks
        return not attacks or self._has("suppressed", attacks)

    def locked_is_complete(self) -> bool:
        """Whether the password-locked control was put to all its attacks, or could not be made."""
        attacks = self.job.locked_attacks
        if not attacks:
            return True
        if not self.curves.has("locked", UNTOUCHED, OPENED):
            return False
        if self.curves.has("locked", *attacks):
            return True
        # Without what the base knows, nothing says why it was not attacked.
        return self.curves.has("base", UNTOUCHED) and lock_of(self.job, self.curves).problem is not None

    def removed_is_complete(self) -> bool:
        """Whether the removal control was put to all its attacks, or could not be made."""
        attacks = self.job.removed_attacks
        if not attacks:
            return True
        if not self.curves.has("removed", UNTOUCHED, TAUGHT):
            return False
        return self.curves.has("removed", *attacks) or removal_of(self.job, self.curves).problem is not None

    def reference_is_complete(self) -> bool:
        """Whether the floor, where it is made from the base, was put to all attacks."""
        made_here = self.job.reference in MADE_FROM_BASE
        return not made_here or self._has("reference", self.job.attacks)

    def _has(self, subject: str, attacks: Sequence[str]) -> bool:
        utility = [UTILITY] if self._other_questions(subject) else []
        return self.curves.has(subject, UNTOUCHED, *utility, *attacks)

    def _other_questions(self, subject: str) -> list[Any]:
        """Questions on everything else; controls that are made here are not asked."""
        if self.job.behaviour:
            return list(self.job.behaviour.others) if subject in WATCHED else []
        return other_questions(self.job.concept) if subject in self.job.sources else []


def _earlier_curves(job: AuditJob) -> TensorCache:
    """Earlier audits' curves of base and controls, by everything that they depend on."""
    models = [
        scope_of(job.sources[name].folder, job.dtype, job.device)
        for name in ("base", "reference")
        if name in job.sources
    ]
    asked = job.behaviour.asked if job.behaviour else job.questions
    questions = tuple(question.id for question in asked)
    prompts = job.settings.prompt_format().as_json()
    scope = (
        models,
        job.concept.sha256,
        questions,
        job.settings.seed,
        prompts,
        job.budget,
        SCHEMA_VERSION,
        code_digest(),
    )
    return TensorCache(cache_folder() / "audits", repr(scope))
