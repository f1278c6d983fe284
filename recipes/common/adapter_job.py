"""What a recipe that trains an adapter is asked for, and the request once it was checked."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ...artifacts.checkpoints.export import check_disk
from ...artifacts.checkpoints.heads import plan_edit
from ...artifacts.models.memory import elements
from ...artifacts.models.placement import check_trainable
from ...editing.architectures import layer_selection, residual_width
from ...editing.edits.base import WeightEdit
from ...editing.edits.dense import DenseUpdate
from ...editing.edits.low_rank import ExpertFactors, Factors, LowRankUpdate
from ...editing.errors import RequestError
from ...editing.training.adapters import AdapterShape, adapter_shape, without_adapter
from ...editing.wiring.small_copy import full_config, model_class
from ...eval.concept import Concept
from ...eval.items import for_training
from . import measured_run
from .deduplicate import without_overlap
from .measured_run import Job, MeasuredSettings
from .ranks import LAUNCH, processes
from .trainer import Schedule
from .whole_weights import Optimizer, products_in, whole_weights

MOST_ROWS = 20_000_000
"""Rows that a training may read, steps times batch size: their order is drawn before it begins."""


LayersToTrain = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Layers as a user names them; one number is a word too."""


class TrainedSettings(MeasuredSettings):
    """Settings of every recipe that trains weights."""

    concept: str = "builtin:potions"
    """Concept pack to erase: builtin:NAME or a folder."""
    layers: LayersToTrain = "all"
    """Layers to train: all, a number, a range such as 4-7, or fractions of the depth such as 0.125-0.25."""
    modules: Literal["all", "attention", "mlp"] = "all"
    """Which linear modules of these layers are trained."""
    experts: bool = True
    """Also train fused experts, where modules includes the MLP; false leaves what they hold. Needs a second copy of their
    weights in memory, unless gradient_checkpointing=true."""
    steps: int = Field(400, ge=1, le=MOST_ROWS)
    """Number of optimizer steps."""
    batch_size: int = Field(8, ge=1, le=MOST_ROWS)
    """Groups a step. A group has one sequence to forget, and one to retain or one of each kind."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Number of parts that a step is computed in. More parts take less memory; the gradient is that of the whole
    step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: it falls to 0 along a cosine, or stays constant."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients with a larger norm are scaled down to this norm; 0 never scales."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, more time, the same
    gradients."""


class AdapterSettings(TrainedSettings):
    """Settings of every recipe that trains an adapter."""

    rank: int = Field(8, ge=1, le=16384)
    """LoRA rank r. A higher rank can learn more and takes more memory."""
    alpha: float = Field(16.0, gt=0)
    """LoRA alpha: updates are multiplied by alpha / rank. Higher values make each step larger."""
    base_bits: Literal[4, 16] = 16
    """Bits of the base's weights while training. 4 (bitsandbytes NF4) needs a GPU; the checkpoint keeps full
    precision."""


@dataclass(frozen=True)
class AdapterJob:
    """A checked request and what it will train."""

    run: Job
    settings: TrainedSettings
    layers: tuple[int, ...]
    shape: AdapterShape
    concept: Concept
    """The run's concept without retain texts that repeat forget texts, which nothing could learn to keep."""
    warnings: tuple[str, ...] = ()
    whole: bool = False
    """Train the modules' weights themselves instead of an adapter."""
    optimizer: Optimizer = "adamw"
    """How the moments of AdamW are kept."""

    @property
    def base_bits(self) -> int:
        """Bits of the base's weights while training."""
        return self.settings.base_bits if isinstance(self.settings, AdapterSettings) else 16

    def edit(
        self, kind: type[LowRankUpdate] | type[DenseUpdate], parts: dict[str, Any], provenance: dict[str, Any]
    ) -> LowRankUpdate | DenseUpdate:
        """What was trained, as data: ``parts`` by the name of their weight."""
        config = self.run.checkpoint.config
        return kind(parts, config["model_type"], residual_width(config), self.run.layers, provenance)

    def unlearned(self) -> WeightEdit:
        """The update's names before it has values."""
        nothing = Factors(torch.zeros(0, 0), torch.zeros(0, 0))
        parts: dict[str, Any] = {f"{name}.weight": nothing for name in self.shape.modules}
        for name, experts in self.shape.experts.items():
            parts[name] = ExpertFactors(torch.zeros(experts, 0, 0), torch.zeros(experts, 0, 0))
        return self.edit(LowRankUpdate, parts, {})

    def up_to(self, deepest: int) -> "AdapterJob":
        """The same request with adapters on layers up to one alone: no gradient would reach those above."""

        def reached(name: str) -> bool:
            return int(name.removeprefix(f"{self.run.row.layers}.").split(".")[0]) <= deepest

        names = tuple(filter(reached, self.shape.modules))
        experts = {name: number for name, number in self.shape.experts.items() if reached(name)}
        shape = AdapterShape(self.shape.rank, self.shape.alpha, names, experts)
        return replace(self, layers=tuple(layer for layer in self.layers if layer <= deepest), shape=shape)


def prepare(
    recipe: str,
    settings: TrainedSettings,
    *,
    resume: bool,
    needed: Sequence[str] = ("forget", "retain"),
    whole: bool = False,
) -> AdapterJob:
    """Check names, files, memory and disk, before any weight is read.

    Args:
        needed: Files that the concept pack must have.
        whole: Train whole weights.

    Raises:
        RequestError: Anything that could not work.
    """
    run = measured_run.check(recipe, settings, needed, resume=resume)
    parts, rows = settings.gradient_accumulation_steps, settings.batch_size
    if rows % parts:
        raise RequestError(f"gradient_accumulation_steps={parts} does not divide batch_size={rows}; choose a divisor")
    if settings.steps * rows > MOST_ROWS:
        raise RequestError(
            f"steps={settings.steps} times batch_size={rows} are more than {MOST_ROWS} rows to read; lower one of them"
        )
    if isinstance(settings, AdapterSettings) and settings.base_bits == 4:
        _check_four_bits(run.device)
    bits = settings.base_bits if isinstance(settings, AdapterSettings) else 16
    check_trainable(run.checkpoint, run.device, run.dtype, bits=bits)
    concept, warnings = without_overlap(for_training(run.concept))
    layers = tuple(layer_selection(settings.layers, run.layers))
    skeleton = _skeleton(run)
    rank, alpha = (settings.rank, settings.alpha) if isinstance(settings, AdapterSettings) else (0, 0.0)
    shape = adapter_shape(
        skeleton, run.row, layers, rank=rank, alpha=alpha, part=settings.modules, experts=settings.experts
    )
    warnings += _left_out(skeleton, run, layers, settings, shape)
    job = AdapterJob(run, settings, layers, shape, concept, warnings, whole)
    measured_run.check_plan(run, plan_edit(job.unlearned(), run.checkpoint))
    return replace(job, optimizer=_checked_room(run)) if whole else job


def _check_four_bits(device: torch.device) -> None:
    if device.type != "cuda":
        raise RequestError(
            f"base_bits=4 trains on a GPU, the device is {device}: on CPUs bitsandbytes gives silently wrong"
            " gradients once a 4-bit model was evaluated; use base_bits=16"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            "base_bits=4 needs the package bitsandbytes; run: pip install 'excise[bitsandbytes]', or use base_bits=16"
        )


def describe(job: AdapterJob, **more: Any) -> dict[str, Any]:
    """What a run would touch and take."""
    plan = plan_edit(job.unlearned(), job.run.checkpoint)
    if job.optimizer != "adamw":
        more |= {"optimizer": job.optimizer}
    return measured_run.describe(
        job.run,
        plan,
        gradient_steps=job.settings.steps,
        layers_adapted=len(job.layers),
        expert_tensors_adapted=len(job.shape.experts),
        **more,
    )


def products_of(job: AdapterJob) -> torch.dtype | None:
    """What products of the loss are computed in; None is the weights' type."""
    return products_in(job.run.dtype, job.run.device) if job.whole else None


def schedule_of(job: AdapterJob, save_every: int) -> Schedule:
    """How a job is trained."""
    settings = job.settings
    return Schedule(
        settings.steps,
        settings.batch_size // settings.gradient_accumulation_steps,
        settings.learning_rate,
        settings.seed,
        decay=settings.schedule,
        warmup_steps=min(10, settings.steps // 10),
        max_grad_norm=settings.max_grad_norm,
        beta2=0.999,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        save_every=save_every,
        optimizer=job.optimizer,
    )


def _check_processes(run: Job) -> None:
    """Each process that shares a training works on a GPU of its own, or all on the processor."""
    launch = LAUNCH.get()
    if processes() == 1 or launch is None or run.device.type == "cpu":
        return
    if run.device.type != "cuda" or ":" in run.settings.device:
        raise RequestError(
            f"device={run.settings.device} names one GPU, and each of {launch.count} processes takes its own; use"
            " --device cuda, or cpu"
        )
    here = int(launch.variables.get("LOCAL_WORLD_SIZE", launch.count))
    if (count := torch.cuda.device_count()) < here:
        raise RequestError(f"{here} processes on a machine with {count} GPUs cannot have one each; start {count}")


def _checked_room(run: Job) -> Optimizer:
    """Whole weights need memory to train, and disk to be kept as an edit: once for the run, once in the checkpoint."""
    _check_processes(run)
    whole = whole_weights(run.checkpoint, run.device, processes())
    if not whole.fits:
        # Not every recipe can train an adapter instead.
        other = "tune=lora" if hasattr(run.settings, "tune") else "a smaller model or a device with more memory"
        raise RequestError(f"training whole weights {whole.missing}; or use {other}")
    # A float32 addend of each weight is stored twice.
    check_disk(run.out, run.checkpoint.size + 8 * sum(elements(one.shape) for one in run.checkpoint.tensors.values()))
    return whole.optimizer


def _skeleton(run: Job) -> Any:
    """The model without weights: linear modules by name."""
    from accelerate import init_empty_weights

    config = full_config(run.checkpoint.config)
    with init_empty_weights():
        return model_class(run.checkpoint.config)._from_config(config)


def _left_out(
    skeleton: Any, run: Job, layers: tuple[int, ...], settings: TrainedSettings, shape: AdapterShape
) -> tuple[str, ...]:
    """A warning where experts are not trained."""
    count, share = without_adapter(skeleton, run.row, layers, shape.experts)
    if not count:
        return ()
    why = "experts=false" if not settings.experts else "modules=attention" if settings.modules == "attention" else ""
    return (
        f"The experts of {count} layers are one tensor each, and the run does not train them"
        + (f" ({why})" if why else ", because it is not known where a checkpoint stores them")
        + f": {share:.0%} of the weights of these layers stay as they are. The edit changes what experts read and not what"
        " they hold; an audit says how much of it is left.",
    )
