"""What distillation is asked for, and a request that was checked."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from ...artifacts.checkpoints.manifest import checkpoint_of
from ...artifacts.checkpoints.read import Checkpoint, open_checkpoint
from ...artifacts.models.find import find_model
from ...artifacts.models.source import ModelSource
from ...editing.errors import RequestError
from ..common import adapter_job
from ..common.adapter_job import MOST_ROWS, AdapterJob, TrainedSettings
from ..common.budgets import Budgets
from ..common.run_record import of_its_run
from ..data.facts import Facts, find_facts

RECIPE = "distill"


class DistillSettings(TrainedSettings):
    """Settings of noise and distillation (Lee et al. 2025, "Distillation robustifies unlearning")."""

    budgets: ClassVar[Budgets] = {"quick": {"steps": 100}, "long": {"steps": 1600}}
    teacher: str
    """Edited model to distill: a run's folder, a checkpoint or a Hub id. A run names its own base and concept."""
    shrink: float = Field(0.6, ge=0, le=1)
    """How far each weight is moved from the teacher's toward noise (paper's alpha). Higher values leave less to come
    back, and need more steps."""
    noise: float = Field(0.1, ge=0)
    """Size of the noise, in that of a fresh Xavier matrix (paper's beta); 0 only shrinks the weights."""
    keep: Literal["base", "teacher"] = "base"
    """Whose predictions are learned on what must stay. With base, damage that the edit did to it is mended (paper:
    teacher)."""
    retain_rows: int = Field(3, ge=1, le=64)
    """Sequences that must stay for each one about the concept (paper: everything is general text)."""
    samples: int = Field(2000, ge=0, le=1_000_000)
    """Sequences that the edited model writes from short beginnings, to be learned beside the pack's texts and replies:
    what it knows beyond the pack would be lost. 0 learns the pack alone."""
    stored_tokens: int = Field(128, ge=8)
    """Tokens stored of each distribution; all others count as one token. More take more memory and are more exact."""
    steps: int = Field(400, ge=1, le=MOST_ROWS)
    """Number of optimizer steps. More mend more of what the noise broke."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW; models of a billion weights and more take 2e-5 (paper)."""

    def completed(self) -> Self:
        """Base and concept from the record of the run that made the teacher, where they were not given."""
        return self.model_copy(update=of_its_run(self, self.teacher))


@dataclass(frozen=True)
class DistillJob:
    """A checked request, the edited model, and the facts that the pack teaches."""

    adapter: AdapterJob
    settings: DistillSettings
    teacher: ModelSource
    edited: Checkpoint
    """The teacher's."""
    facts: Facts


def prepare(settings: DistillSettings, *, resume: bool = False) -> DistillJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if not settings.shrink:
        raise RequestError("shrink=0 leaves the teacher as it is; give more than 0, up to 1 for a model of noise")
    settings = settings.completed()
    adapter = adapter_job.prepare(RECIPE, settings, resume=resume, whole=True)
    teacher = find_model(settings.teacher)
    edited = open_checkpoint(checkpoint_of(teacher.folder))
    _check_alike(adapter.run.checkpoint, edited, teacher.name)
    adapter = replace(adapter, run=replace(adapter.run, read={"the teacher": teacher}))
    return DistillJob(adapter, settings, teacher, edited, find_facts(adapter.run.concept))


def _check_alike(base: Checkpoint, edited: Checkpoint, name: str) -> None:
    differ = [
        tensor
        for tensor in base.tensors
        if getattr(edited.tensors.get(tensor), "shape", None) != base.tensors[tensor].shape
    ]
    if differ:
        raise RequestError(
            f"{len(differ)} tensors of the base, such as {differ[0]}, are missing or of another shape in {name}; give"
            " the base that the teacher was made from with --model"
        )


def describe(job: DistillJob) -> dict[str, Any]:
    """What a run would touch and take."""
    return adapter_job.describe(job.adapter, teacher=job.teacher.name, facts_found=len(job.facts.facts))
