"""Noise and distil: an edited model's copy is damaged, and learns again from what the edited model predicts (UNDO).

Lee et al. 2025, "Distillation robustifies unlearning": what an edit hides is still in the weights and comes back with
little training. A student whose weights were moved toward noise has lost it, and learns only what the teacher shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts.checkpoints.read import read_tensor
from ...artifacts.events import Events, Stage
from ...artifacts.models.load import LoadedModel, load_model
from ...editing.edits.base import WeightEdit
from ...editing.modules import unembedding
from ...editing.training.soft_targets import keep_top
from ...editing.wiring.row import spelled
from ..common import adapter_run
from ..common.adapter_run import Training
from ..common.examples import spread
from ..common.measured_run import Finished
from ..common.memory_plan import MemoryPlan, RunMemory, tokens_at_once
from ..common.memory_sizes import Rows
from ..common.prefix_cache import READ, final_hidden_states
from ..common.tokens import Row, encode
from ..common.trainer import Terms
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
from .request import DistillJob, DistillSettings, describe, prepare
from .rows import beginnings, rows_to_read
from .story import story

__all__ = ["DistillSettings", "describe", "learn", "memory", "prepare", "run", "story", "trains_whole_weights"]


def trains_whole_weights(_: DistillJob) -> bool:
    """Whether several processes can share the training."""
    return True


def memory(job: DistillJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, settings, run = RunMemory.of(job.adapter.run), job.settings, job.adapter.run
    texts = job.adapter.concept.texts()
    longest = needs.longest(texts, needs.text_limit)
    positions = needs.tokens(texts) + settings.samples * settings.max_new_tokens
    targets = positions * settings.stored_tokens * TARGET_BYTES
    read = Rows(max(1, READ // longest) if run.device.type == "cpu" else 64, longest)
    reading = needs.reading("read the models", read, kept=targets)
    # Log-probabilities of a whole row in fp32, and what is made of them beside; the edited model stands beside the base
    # while both are read.
    work = reading.work + 3 * 4 * longest * needs.sizes.vocabulary
    reading = replace(reading, weights=2 * needs.weights, work=work)
    forget, stays = _lengths(job, needs) if needs.tokenizes() else ([longest], [longest])
    kinds = [forget, *[stays] * settings.retain_rows]
    part = largest_part(kinds, settings.steps, settings.batch_size, part_size(run.device), settings.seed)
    train = needs.training(job.adapter, part, kept=targets)
    return needs.measured_run([reading, train], edit=needs.edit_of(job.adapter))


def _lengths(job: DistillJob, needs: RunMemory) -> tuple[list[int], list[int]]:
    """Tokens of what is to be forgotten, and of what stays, before the models have written any of it."""
    settings, concept, tokenizer, limit = job.settings, job.adapter.concept, needs.tokenizer, needs.text_limit
    forget = [len(one.ids) for one in forget_examples(concept, job.facts, tokenizer, settings.seed, limit)]
    stays = [len(one.ids) for one in retain_examples(concept, tokenizer, settings.seed, limit)]
    for begun in beginnings(concept, settings.samples, settings.seed):
        stays.append(len(encode(tokenizer, begun, True)) + settings.max_new_tokens)
    return forget, stays


def run(job: DistillJob, events: Events) -> Finished:
    """Do the whole run: read teacher and base, damage, distil, measure, publish."""
    return adapter_run.run(job.adapter, "distilled from an edited model", partial(_training, job), events)


def learn(job: DistillJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return adapter_run.learn(job.adapter, loaded, partial(_training, job), work, events)


def _training(job: DistillJob, loaded: LoadedModel, events: Events, _: Path) -> "DistillTraining":
    settings, base = job.settings, loaded.model
    with events.stage("load the edited model"):
        teacher = load_model(job.teacher, job.adapter.run.device, job.adapter.run.dtype).model
    keeper = base if settings.keep == "base" else teacher
    with events.stage("write what is to be learned") as stage:
        rows = rows_to_read(keeper, teacher, loaded.tokenizer, job.adapter.concept, job.facts, settings, stage.advance)
    groups = settings.steps * settings.batch_size
    # Rows that no step will read need no targets.
    forget = spread(rows.forget, groups, f"excise distill {settings.seed}")
    share = 1 / (1 + settings.retain_rows)
    with events.stage("read what is to be learned", len(forget) + len(rows.kept) + len(rows.written)) as stage:
        learned = partial(_read, stored=settings.stored_tokens, weight=share, stage=stage)
        sequences = {"forget": learned(teacher, forget, term="erase")}
        stays = [*learned(keeper, rows.kept, term="retain"), *learned(teacher, rows.written, term="retain")]
    sequences |= {f"retain {number}": stays for number in range(settings.retain_rows)}
    return DistillTraining(job, base, sequences)


@torch.no_grad()
def _read(
    model: Any, rows: Sequence[Row], *, stored: int, term: str, weight: float, stage: Stage
) -> list[TrainingSequence]:
    """What a model predicts along some rows, at every position."""
    head, read = unembedding(model), []
    for row, hidden in final_hidden_states(model, {row: len(row) for row in rows}):
        targets, n = keep_top(head(hidden).float().log_softmax(-1), stored), len(row)
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


class DistillTraining(Training):
    """Sequences about the concept as the edited model predicts them, and others as the base does."""

    def __init__(self, job: DistillJob, model: nn.Module, sequences: dict[str, list[TrainingSequence]]):
        settings = job.settings
        self.job, self.sequences = job, sequences
        self.rows = arrange(sequences, settings.steps * settings.batch_size, settings.seed)
        self.checked_rows = [one.ids for kind in ("forget", "retain 0") for one in sequences[kind][:8]]
        most = tokens_at_once(job.adapter, part_size(job.adapter.run.device))
        self.distillation = Distillation(self.rows, most)

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
        """The student begins as the teacher, moved toward noise."""
        damage(model, self.job)

    def report(self, model: Any) -> dict[str, Any]:
        """What was distilled from what."""
        settings = self.job.settings
        counts = {"forget": len(self.sequences["forget"]), "retain": len(self.sequences["retain 0"])}
        training = {
            "about": f"Noise and distillation of `{self.job.teacher.name}`.",
            "steps": settings.steps,
            "rows": settings.batch_size * (1 + settings.retain_rows),
            "data": f"{counts['forget']} sequences about the concept, {counts['retain']} to retain",
            "lessons": counts,
        }
        teacher = {key: value for key, value in self.job.teacher.describe().items() if key != "files"}
        return {"training": training, "warnings": list(self.job.adapter.warnings), "distilled": {"teacher": teacher}}


@torch.no_grad()
def damage(model: nn.Module, job: DistillJob) -> None:
    """Make a model's trained weights ``(1 - a) W + a b X``: W the teacher's, X a fresh Xavier-uniform matrix."""
    settings = job.settings
    generator = torch.Generator().manual_seed(settings.seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            stored = spelled(job.adapter.run.row, name, job.edited.tensors)
            assert stored is not None, f"{name} was found when the request was checked"
            edited = read_tensor(job.edited.tensors[stored]).float()
            noise = xavier(edited.shape, generator)
            weight.copy_((1 - settings.shrink) * edited + settings.shrink * settings.noise * noise)


def xavier(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A matrix of independent uniform entries of variance 2 / (rows + columns) (Glorot and Bengio 2010, equation 16)."""
    bound = (6 / (shape[-2] + shape[-1])) ** 0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)
