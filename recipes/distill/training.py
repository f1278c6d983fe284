"""Learning what models predict: each sequence with the distributions that one of them has along it, read before training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ...artifacts.events import Stage
from ...editing.modules import unembedding
from ...editing.training.soft_targets import keep_top
from ..common.adapter_job import AdapterJob
from ..common.adapter_run import Training
from ..common.memory_plan import RunMemory, StageMemory, tokens_at_once
from ..common.memory_sizes import Rows
from ..common.prefix_cache import READ, final_hidden_states
from ..common.tokens import Row, encode
from ..common.trainer import Terms
from ..data.facts import Facts
from ..data.unlearning_sets import forget_examples, retain_examples
from ..elm.batches import (
    TARGET_BYTES,
    TERMS,
    SequenceObjective,
    TrainingSequence,
    arrange,
    largest_part,
    part_size,
    sequence_loss,
)
from .request import DistillSettings
from .rows import beginnings


@torch.no_grad()
def predictions(
    model: Any, rows: Sequence[Row], settings: DistillSettings, stage: Stage, *, term: str
) -> list[TrainingSequence]:
    """What a model predicts along some rows, at every position; ``term`` is the part of the loss that they count in."""
    head, read, weight = unembedding(model), [], 1 / (1 + settings.retain_rows)
    for row, hidden in final_hidden_states(model, {row: len(row) for row in rows}):
        targets, n = keep_top(head(hidden).float().log_softmax(-1), settings.stored_tokens), len(row)
        read.append(TrainingSequence(row, targets, torch.full((n,), weight / n), torch.full((n,), TERMS.index(term))))
        stage.advance(1)
    return read


@dataclass
class Distillation(SequenceObjective):
    """The divergence from what the models predict."""

    rows: Sequence[Sequence[TrainingSequence]]
    tokens_at_once: int

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """Of both kinds of sequences alike."""
        return sequence_loss(dict.fromkeys(TERMS, 1.0))(model, batch)


@dataclass(frozen=True)
class Start:
    """Where training begins, and what is said of it."""

    about: str
    """What was trained, in a sentence."""
    begin: Callable[[nn.Module], None] = lambda _: None
    """Changes the weights to where training begins."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Further sections of ``eval.json``."""


class DistillTraining(Training):
    """Sequences about the concept as one model predicts them, and sequences that must stay as another does."""

    def __init__(
        self, job: AdapterJob, forget: Sequence[TrainingSequence], stays: Sequence[TrainingSequence], start: Start
    ):
        settings = job.settings
        assert isinstance(settings, DistillSettings), "its settings say how many rows a group has"
        self.job, self.settings, self.start = job, settings, start
        self.sequences = {"forget": forget, **{f"retain {number}": stays for number in range(settings.retain_rows)}}
        self.rows = arrange(self.sequences, settings.steps * settings.batch_size, settings.seed)
        self.checked_rows = [one.ids for kind in ("forget", "retain 0") for one in self.sequences[kind][:8]]
        self.distillation = Distillation(self.rows, tokens_at_once(job, part_size(job.run.device)))

    def objective(self) -> Distillation:
        """The divergence from what the models predict."""
        return self.distillation

    def collate(self, rows: list[Sequence[TrainingSequence]]) -> dict[str, Any]:
        """The objective's."""
        return self.distillation.collate(rows)

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """The objective's."""
        return self.distillation.loss(model, batch)

    def begin(self, model: nn.Module) -> None:
        """Where the start says."""
        self.start.begin(model)

    def report(self, model: Any) -> dict[str, Any]:
        """What was learned from what."""
        settings = self.settings
        counts = {"forget": len(self.sequences["forget"]), "retain": len(self.sequences["retain 0"])}
        training = {
            "about": self.start.about,
            "steps": settings.steps,
            "rows": settings.batch_size * (1 + settings.retain_rows),
            "data": f"{counts['forget']} sequences about the concept, {counts['retain']} to retain",
            "lessons": counts,
        }
        return {"training": training, "warnings": list(self.job.warnings), **self.start.sections}


def stages(needs: RunMemory, job: AdapterJob, facts: Facts) -> list[StageMemory]:
    """What reading two models and learning from them holds in memory."""
    settings, run = job.settings, job.run
    assert isinstance(settings, DistillSettings), "its settings say how many rows a group has"
    texts = job.concept.texts()
    longest = needs.longest(texts, needs.text_limit)
    positions = needs.tokens(texts) + settings.samples * settings.max_new_tokens
    targets = positions * settings.stored_tokens * TARGET_BYTES
    read = Rows(max(1, READ // longest) if run.device.type == "cpu" else 64, longest)
    reading = needs.reading("read the models", read, kept=targets)
    # Log-probabilities of a whole row in fp32, and what is made of them beside; the edited model stands beside the base
    # while both are read.
    work = reading.work + 3 * 4 * longest * needs.sizes.vocabulary
    reading = replace(reading, weights=2 * needs.weights, work=work)
    forget, stays = _lengths(job, facts, needs) if needs.tokenizes() else ([longest], [longest])
    kinds = [forget, *[stays] * settings.retain_rows]
    part = largest_part(kinds, settings.steps, settings.batch_size, part_size(run.device), settings.seed)
    return [reading, needs.training(job, part, kept=targets)]


def _lengths(job: AdapterJob, facts: Facts, needs: RunMemory) -> tuple[list[int], list[int]]:
    """Tokens of what is to be forgotten, and of what stays, before the models have written any of it."""
    settings, concept, tokenizer, limit = job.settings, job.concept, needs.tokenizer, needs.text_limit
    assert isinstance(settings, DistillSettings), "its settings say how many sequences are written"
    forget = [len(one.ids) for one in forget_examples(concept, facts, tokenizer, settings.seed, limit)]
    stays = [len(one.ids) for one in retain_examples(concept, tokenizer, settings.seed, limit)]
    for begun in beginnings(concept, settings.samples, settings.seed):
        stays.append(len(encode(tokenizer, begun, True)) + settings.max_new_tokens)
    return forget, stays
