"""Noise and distil: an edited model's copy is damaged, and learns again from what the edited model predicts (UNDO).

Lee et al. 2025, "Distillation robustifies unlearning": what an edit hides is still in the weights and comes back with
little training. A student whose weights were moved toward noise has lost it, and learns only what the teacher shows.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts.checkpoints.read import read_tensor
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel, load_model
from ...editing.edits.base import WeightEdit
from ...editing.wiring.row import spelled
from ..common import adapter_run
from ..common.examples import spread
from ..common.measured_run import Finished
from ..common.memory_plan import MemoryPlan, RunMemory
from .request import DistillJob, DistillSettings, describe, prepare
from .rows import rows_to_read
from .story import story
from .training import DistillTraining, Start, predictions, stages

__all__ = ["DistillSettings", "describe", "learn", "memory", "prepare", "run", "story", "trains_whole_weights"]


def trains_whole_weights(_: DistillJob) -> bool:
    """Whether several processes can share the training."""
    return True


def memory(job: DistillJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs = RunMemory.of(job.adapter.run)
    return needs.measured_run(stages(needs, job.adapter, job.facts), edit=needs.edit_of(job.adapter))


def run(job: DistillJob, events: Events) -> Finished:
    """Do the whole run: read teacher and base, damage, distil, measure, publish."""
    return adapter_run.run(job.adapter, "distilled from an edited model", partial(_training, job), events)


def learn(job: DistillJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return adapter_run.learn(job.adapter, loaded, partial(_training, job), work, events)


def _training(job: DistillJob, loaded: LoadedModel, events: Events, _: Path) -> DistillTraining:
    settings, base = job.settings, loaded.model
    with events.stage("load the edited model"):
        teacher = load_model(job.teacher, job.adapter.run.device, job.adapter.run.dtype).model
    keeper = base if settings.keep == "base" else teacher
    with events.stage("write what is to be learned") as stage:
        rows = rows_to_read(keeper, teacher, loaded.tokenizer, job.adapter.concept, job.facts, settings, stage.advance)
    groups = settings.steps * settings.batch_size
    # Rows that no step will read need no targets.
    forget = spread(rows.forget, groups, f"excise distill {settings.seed}")
    with events.stage("read what is to be learned", len(forget) + len(rows.kept) + len(rows.written)) as stage:
        erased = predictions(teacher, forget, settings, stage, term="erase")
        stays = [
            *predictions(keeper, rows.kept, settings, stage, term="retain"),
            *predictions(teacher, rows.written, settings, stage, term="retain"),
        ]
    about = {key: value for key, value in job.teacher.describe().items() if key != "files"}
    start = Start(
        f"Noise and distillation of `{job.teacher.name}`.",
        partial(damage, job=job),
        {"distilled": {"teacher": about}},
    )
    return DistillTraining(job.adapter, erased, stays, start)


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
