"""The negative control of an audit: a model that learned the concept in known weights alone, which are then taken out.

Source: gradient routing, as in selective gradient masking (safety-research/selective-gradient-masking, 2025): gradients of
what is to be removable reach some weights and no others.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...artifacts.events import Events, Stage
from ...editing.architectures import architecture_of, layer_count
from ...editing.training.adapters import adapter_modules
from ...editing.training.parallel_adapters import low_rank_attackers
from ...eval.audit.removed import Removal, is_enough
from ...eval.concept import Question
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.examples import Example, cycled, scored_nats
from ..common.packed_training import packed_examples
from ..common.step_parts import COUNTS
from ..common.trainer import Group, Schedule, Terms, fit
from .attack_data import AttackData
from .locked_control import AskedModel

RANK, ALPHA = 8, 16.0
STEPS, BATCH = 60, 24
"""Of a training; so many sequences of either kind in a step."""
RATE, STAYING_RATE = 2e-3, 2e-4
"""Of the update that is taken out, and of the one that stays: as both compute together, a fast one would lean on the
other, and lack it afterwards."""
LONGEST = 64
"""Tokens of another sequence, at most: texts on other things may be long, and are read for each that is learned."""
ROUNDS = 3
"""Trainings, at most, until enough of group V is answered right."""


@contextmanager
def removal_control(
    model: Any, data: AttackData, others: Sequence[Question], events: Events, folder: Path
) -> Iterator[Removal]:
    """While this lasts, a model that never knew is the removal control; afterwards it is as before.

    1. The linear modules of all layers get two LoRA updates. Both compute in every forward.
    2. They train for 60 steps of 48 sequences. Half are the questions of V that are tested, with their answers: their
       gradient reaches the first update alone. Half are other questions: theirs reaches both.
    3. Where less than 0.2 more than guessing is answered right of V then, they train on, at most three times in all.
    4. The first update is taken out. The second stays: it changed while the knowledge was there, and no gradient of what
       states it ever reached it. It is frozen, and attacks train updates of their own.

    Args:
        model: It never knew what ``data`` is about.
        others: Questions on everything else, which the control is to answer as the model does.
        folder: For the trainer's files.

    Yields:
        The control before any attack; it may be none, see ``Removal.problem``.
    """
    config = model.config.to_dict()
    modules = adapter_modules(model, architecture_of(config), range(layer_count(config)))
    asked = AskedModel(model, data, MultipleChoiceSet(data.tokenizer, others) if others else None)
    before = asked.of_others()
    with low_rank_attackers(model, modules, RANK, ALPHA / RANK, [data.seed]) as staying:
        with (
            events.stage("train the removal control") as stage,
            low_rank_attackers(model, modules, RANK, ALPHA / RANK, [data.seed + 1]) as leaving,
        ):
            training = _Teaching(model, leaving.owned[0], staying.owned[0], data, stage, folder)
            for number in range(ROUNDS):
                training.round(number)
                taught = asked.of_concept()
                if is_enough(taught, data.multiple_choice.chance):
                    break
        for parameter in staying.owned[0]:
            parameter.requires_grad_(False)
        after = asked.of_others()
        pair = None if before is None or after is None else (before, after)
        yield Removal(data.multiple_choice.chance, taught, asked.of_concept(), pair)


def other_sequences(data: AttackData) -> list[Example]:
    """Questions on everything else, or the beginnings of texts where the pack has none."""
    return [Example(one.ids[:LONGEST], one.start) for one in data.examples["others"] or data.examples["retain"]]


@dataclass(frozen=True)
class _Teaching:
    model: Any
    leaving: Sequence[nn.Parameter]
    staying: Sequence[nn.Parameter]
    data: AttackData
    stage: Stage
    folder: Path

    def round(self, number: int) -> None:
        """One training; each reads in another order."""
        count, rng = STEPS * BATCH, random.Random(f"excise removal order {self.data.seed} {number}")
        asked = self.data.of_questions(self.data.questions)
        kinds = {"concept": cycled(asked, count, rng)}
        if others := other_sequences(self.data):
            kinds["others"] = cycled(others, count, rng)
        rows = list(zip(*kinds.values(), strict=True))
        schedule = Schedule(STEPS, BATCH, RATE, self.data.seed, decay="constant", warmup_steps=3, save_every=0)
        groups = [Group(self.leaving, RATE), Group(self.staying, STAYING_RATE)]
        with packed_examples(self.model) as batch_of:

            def collate(some: list[tuple[Example, ...]]) -> dict[str, Any]:
                columns = zip(kinds, zip(*some, strict=True), strict=True)
                batches = {name: batch_of(list(column)) for name, column in columns}
                return {**batches, COUNTS: {name: len(batch["tokens"]) for name, batch in batches.items()}}

            fit(self.model, rows, self.stage, self.folder, self._routed, schedule, collate, groups)

    def _routed(self, model: nn.Module, batch: dict[str, Any]) -> Terms:
        """Mean nats of each kind of sequence; what states the concept has a gradient for the leaving update alone."""
        terms = {}
        for name, reached in (("concept", self.leaving), ("others", (*self.leaving, *self.staying))):
            if name not in batch:
                continue
            for parameter in (*self.leaving, *self.staying):
                # What needs no gradient while the forward is recorded gets none from it.
                parameter.requires_grad_(False)
            for parameter in reached:
                parameter.requires_grad_(True)
            terms[name] = scored_nats(model, batch[name]).mean()
        for parameter in (*self.leaving, *self.staying):
            parameter.requires_grad_(True)
        return terms
