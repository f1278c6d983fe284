"""What RepSelect is asked for, and a request that was checked."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from ...artifacts.checkpoints.export import check_disk, required_bytes
from ...artifacts.checkpoints.heads import plan_edit
from ...artifacts.checkpoints.read import ITEM_SIZES, Checkpoint
from ...artifacts.models.memory import elements
from ...editing.architectures import residual_width
from ...editing.edits.base import Plan
from ...editing.errors import RequestError
from ...editing.numerics.spectrum import Rule, Sides
from ..common import adapter_job, measured_run
from ..common.adapter_job import MOST_ROWS, AdapterJob, AdapterSettings, LayersToTrain
from ..common.budgets import Budgets
from ..common.measured_job import MeasuredSettings
from ..common.run_record import of_its_run
from ..data.facts import Facts, find_facts
from ..distill.request import DistillSettings
from .after import EditedModel, edited_model

RECIPE = "repselect"
WIDTH_SHARE = 8
"""By default one component for so many of the model's width."""


class RepselectSettings(MeasuredSettings):
    """Settings of RepSelect (arXiv 2606.17168), the authors' single-shot variant."""

    budgets: ClassVar[Budgets] = {"quick": {"texts": 400, "controls": False}, "long": {"texts": 16000}}
    concept: str = "builtin:potions"
    """Concept pack to erase: builtin:NAME or a folder."""
    after: str | None = None
    """Edited model to go on from: a run's folder, a checkpoint or a Hub id. The result is one edit of the base that it was
    made from."""
    layers: LayersToTrain = "all"
    """Layers to edit: all, a number, a range such as 4-7, or fractions of the depth such as 0.125-0.25."""
    modules: Literal["all", "attention", "mlp"] = "mlp"
    """Which linear modules of these layers are edited (paper: those of the MLP)."""
    experts: bool = True
    """Also edit fused experts, where modules includes the MLP."""
    scored: Literal["texts", "answers"] = "texts"
    """What is made unlikely: every token of the forget texts (paper), or only answers, in the contexts of the pack's
    facts."""
    texts: int = Field(4000, ge=1)
    """Most sequences that gradients are summed over, drawn at random."""
    components: int = Field(0, ge=0)
    """Leading components of each gradient that are made smaller. 0 takes an eighth of the model's width (paper: 512 of
    4096). More spare what the concept shares with other topics, and erase less."""
    rule: Rule = "soft"
    """What becomes of them on each side: divided by their relative size (soft, paper), by its square (quadratic), or
    removed (hard)."""
    sides: Sides = "both"
    """On which sides of the matrices: inputs, outputs or both (paper)."""
    basis: Literal["forget", "retain"] = "forget"
    """Whose components: those of the gradient itself (paper), or of the gradient on retain texts."""
    adversary: bool = True
    """Train adapters on the concept for one epoch before gradients are taken, so that hidden knowledge shows (paper)."""
    adversary_rate: float = Field(0.01, gt=0)
    """Learning rate of this training, by plain gradient descent (paper: 0.01, searched from 0.005 to 0.5)."""
    rank: int = Field(8, ge=1, le=16384)
    """LoRA rank of these adapters (paper: 8)."""
    alpha: float = Field(8.0, gt=0)
    """LoRA alpha of these adapters (paper: 8)."""
    batch_size: int = Field(4, ge=1)
    """Sequences a step of this training."""
    mend: int = Field(0, ge=0, le=MOST_ROWS)
    """Steps of training after the step, which mend what it cost: toward the base's predictions on what must stay, and toward
    what the step left on the concept. 0 takes none."""
    mend_rate: float = Field(3e-4, gt=0)
    """Peak learning rate of AdamW while mending."""
    controls: bool = True
    """Also measure the plain gradient, nothing made smaller, at the same budget."""
    kl_budget: float = Field(0.01, gt=0)
    """KL(base || edited) on retain texts, in nats per token, that the step takes up to 95% to 100% (paper: 0.01). With after,
    from the model before the step. Higher values erase and damage more."""

    def completed(self) -> Self:
        """Base and concept from the record of the run that made ``after``, where they were not given."""
        return self.model_copy(update=of_its_run(self, self.after)) if self.after else self

    def check_searchable(self) -> None:
        """Raise unless the step is the whole edit.

        Raises:
            RequestError: It goes on from another edit, or is mended.
        """
        if self.after is not None:
            raise RequestError(
                "a search turns the strength of a whole edit, and with after only the step has one; search without after,"
                " with the edited model as --model"
            )
        if self.mend:
            raise RequestError("a search turns the strength of the step, which mend follows; search with mend=0")

    def adversary_settings(self) -> AdapterSettings:
        """How the adapters are trained. The number of steps is known once the texts are read."""
        return AdapterSettings(
            **self._shared(),
            modules=self.modules,
            rank=self.rank,
            alpha=self.alpha,
            batch_size=self.batch_size,
            steps=1,
            learning_rate=self.adversary_rate,
            schedule="constant",
            max_grad_norm=0.0,
        )

    def mend_settings(self) -> DistillSettings:
        """How what must stay is mended: distillation from where the step ended, nothing moved toward noise."""
        return DistillSettings(
            **self._shared(), teacher="the step", samples=0, steps=self.mend, learning_rate=self.mend_rate
        )

    def _shared(self) -> dict[str, Any]:
        """Settings that every part of the run has."""
        fields = (*MeasuredSettings.model_fields, "concept", "layers", "experts")
        return {key: getattr(self, key) for key in dict.fromkeys(fields)}


@dataclass(frozen=True)
class RepselectJob:
    """A checked request, and the facts that its pack teaches."""

    adapter: AdapterJob
    """Of the adversary, whose modules are the ones that are edited; ``adapter.run`` is the whole run."""
    settings: RepselectSettings
    facts: Facts
    after: EditedModel | None = None
    """What the step goes on from; None where that is the base."""
    mending: AdapterJob | None = None
    """What trains after the step; None where nothing does."""

    @property
    def numbers(self) -> int:
        """Weights that the edit adds to."""
        return _numbers(self.adapter, plan_edit(self.adapter.unlearned(), self.adapter.run.checkpoint))


def prepare(settings: RepselectSettings, *, resume: bool = False) -> RepselectJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    settings = settings.completed()
    adapter = adapter_job.prepare(RECIPE, settings.adversary_settings(), resume=resume)
    adapter = replace(adapter, run=replace(adapter.run, settings=settings))
    run = adapter.run
    plan = plan_edit(adapter.unlearned(), run.checkpoint)
    _check_left(settings, adapter, plan)
    after = edited_model(settings.after, run.checkpoint) if settings.after else None
    # A float32 addend for each weight is stored twice: in the run's working folder, and in the checkpoint. Which weights
    # the edit before changed is seen once they are read.
    whole = after is not None or settings.mend
    numbers = all_numbers(run.checkpoint) if whole else _numbers(adapter, plan)
    check_disk(run.out, required_bytes(run.checkpoint, plan) + 8 * numbers)
    if after is not None:
        adapter = replace(adapter, run=replace(run, read={"the edited model": after.source}))
    return RepselectJob(adapter, settings, find_facts(run.concept), after, _mending(settings, adapter, resume))


def _mending(settings: RepselectSettings, adapter: AdapterJob, resume: bool) -> AdapterJob | None:
    """The training after the step, with room for it checked."""
    if not settings.mend:
        return None
    mending = adapter_job.prepare(RECIPE, settings.mend_settings(), resume=resume, whole=True)
    return replace(mending, run=adapter.run)


def _check_left(settings: RepselectSettings, adapter: AdapterJob, plan: Plan) -> None:
    shapes = [adapter.run.checkpoint.tensors[name].shape for name in plan.declared]
    narrowest, count = min(min(shape[-2:]) for shape in shapes), components_of(settings, adapter)
    if settings.rule == "hard" and count >= narrowest:
        raise RequestError(
            f"rule=hard removes {count} components, and some matrices have {narrowest}: nothing would be left of their"
            " gradients; lower components, or use rule=soft"
        )


def components_of(settings: RepselectSettings, adapter: AdapterJob) -> int:
    """q: how many components of each gradient are made smaller."""
    return settings.components or max(1, residual_width(adapter.run.checkpoint.config) // WIDTH_SHARE)


def _numbers(adapter: AdapterJob, plan: Plan) -> int:
    tensors = adapter.run.checkpoint.tensors
    return sum(tensors[name].size // ITEM_SIZES[tensors[name].dtype] for name in plan.declared)


def all_numbers(checkpoint: Checkpoint) -> int:
    """Numbers that a checkpoint holds."""
    return sum(elements(tensor.shape) for tensor in checkpoint.tensors.values())


def describe(job: RepselectJob) -> dict[str, Any]:
    """What a run would touch and take."""
    settings, texts = job.settings, len(job.adapter.concept.forget)
    plan = plan_edit(job.adapter.unlearned(), job.adapter.run.checkpoint)
    return measured_run.describe(
        job.adapter.run,
        plan,
        # Of the adapters: one epoch.
        gradient_steps=-(-min(settings.texts, texts) // settings.batch_size) if settings.adversary else 0,
        layers_edited=len(job.adapter.layers),
        facts_found=len(job.facts.facts),
        kl_budget=settings.kl_budget,
        **({"steps_of_mending": settings.mend} if settings.mend else {}),
        **({"after": job.after.source.name} if job.after else {}),
    )
