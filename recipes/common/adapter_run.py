"""What every recipe that trains an adapter shares: checking it, training it, merging and publishing it."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...artifacts.checkpoints.directions import FILE as DIRECTIONS
from ...artifacts.checkpoints.edits import load_edit
from ...artifacts.checkpoints.export import check_disk
from ...artifacts.checkpoints.manifest import FOLDER
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel, load_model
from ...editing.architectures import layer_selection, residual_width
from ...editing.edits.base import WeightEdit
from ...editing.edits.dense import DenseUpdate, learned_deltas, weights_trained
from ...editing.edits.low_rank import Factors, LowRankUpdate
from ...editing.errors import EditError, RequestError
from ...editing.modules import causal_model
from ...editing.training.adapters import AdapterShape, adapter_modules, attach, detach, learned_factors
from ...eval.concept import Concept
from ...eval.inference.likelihood import pad_right
from ...eval.model_under_test import ModelUnderTest
from . import measured_run
from .deduplicate import without_overlap
from .measured_run import Finished, Inspection, Job, Measured, MeasuredSettings
from .run_folder import start_folder
from .tokens import Row
from .trainer import WHOLE_BYTES, Loss, Schedule, fit, memory_for_whole_weights

ADAPTER = "adapter"
MERGED_KL = 0.05
"""Nats by which the merged checkpoint may differ from base and adapter: rounding to its stored type, no more."""


class AdapterSettings(MeasuredSettings):
    """Keys of every recipe that trains an adapter."""

    concept: str = "builtin:potions"
    """Concept pack to erase: builtin:NAME or a folder."""
    layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "all"
    """Layers to adapt: all, a number, a range such as 4-7, or fractions of depth such as 0.125-0.25."""
    modules: Literal["all", "attention", "mlp"] = "all"
    """Linear modules of those layers."""
    rank: int = Field(8, ge=1)
    """LoRA rank."""
    alpha: float = Field(16.0, gt=0)
    """LoRA alpha; updates are scaled by alpha / rank."""
    steps: int = Field(400, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(8, ge=1)
    """Groups a step; a group is one sequence to forget and one of each kind to retain."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Parts a step is computed in, to save memory; gradients are those of the whole."""
    learning_rate: float = Field(2e-3, gt=0)
    """AdamW."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes down."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Largest gradient norm; 0 does not clip."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: the same gradients in less memory."""
    base_bits: Literal[4, 16] = 16
    """4 trains on a bitsandbytes NF4 base (GPU only); the update is merged into the checkpoint at its full precision."""


@dataclass(frozen=True)
class AdapterJob:
    """A checked request and what it will train."""

    job: Job
    settings: AdapterSettings
    layers: tuple[int, ...]
    shape: AdapterShape
    concept: Concept
    """The job's concept without retain texts that repeat forget texts, which nothing could learn to keep."""
    warnings: tuple[str, ...] = ()
    whole: bool = False
    """Train the modules' weights themselves instead of an adapter."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a recipe trains on, and what it says of that in ``eval.json``."""

    groups: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    loss: Loss
    rows: Sequence[Row]
    """Some sequences on which the merged checkpoint must agree with base and adapter."""
    training: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    during: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    """What holds of the model while it trains, and only then."""
    at_step: Callable[[int], None] | None = None
    """Called after each optimizer step, with their number."""
    after: Callable[[Any], dict[str, Any]] = lambda _: {}
    """Looks at the trained model, adapter on; adds to ``eval.json``."""


Teach = Callable[[LoadedModel, Events, Path], TrainingPlan]
"""Makes lessons from the loaded base; the run's working folder is there to keep files in."""


def prepare(
    recipe: str,
    settings: AdapterSettings,
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
    job = measured_run.check(recipe, settings, needed, resume=resume)
    if settings.batch_size % settings.gradient_accumulation_steps:
        raise RequestError(
            f"gradient_accumulation_steps={settings.gradient_accumulation_steps} does not divide batch_size={settings.batch_size}; choose a divisor"
        )
    if settings.base_bits == 4 and job.device.type != "cuda":
        raise RequestError(
            f"base_bits=4 trains on a GPU, the device is {job.device}: on CPUs bitsandbytes gives silently wrong gradients "
            "once a 4-bit model was evaluated; use base_bits=16"
        )
    concept, warnings = without_overlap(job.concept)
    layers = tuple(layer_selection(settings.layers, job.layers))
    shape = AdapterShape(settings.rank, settings.alpha, _modules(job, settings, layers))
    prepared = AdapterJob(job, settings, layers, shape, concept, warnings, whole)
    measured_run.check_plan(job, _unlearned(prepared).plan(job.checkpoint.config, list(job.checkpoint.tensors)))
    if whole:
        _check_room(job)
    return prepared


def _check_room(job: Job) -> None:
    """Whole weights need memory to train, and disk to be kept as an edit: once for the run, once in the checkpoint."""
    need, free = memory_for_whole_weights(job.checkpoint, job.device)
    if need > free:
        raise RequestError(
            f"training whole weights needs {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; use tune=lora"
        )
    check_disk(job.out, job.checkpoint.size + 8 * need // WHOLE_BYTES)


def up_to(prepared: AdapterJob, deepest: int) -> AdapterJob:
    """Adapt only layers up to one: no gradient would reach those above."""
    path = f"{prepared.job.row.layers}."
    names = tuple(name for name in prepared.shape.modules if int(name.removeprefix(path).split(".")[0]) <= deepest)
    shape = AdapterShape(prepared.shape.rank, prepared.shape.alpha, names)
    return replace(prepared, layers=tuple(layer for layer in prepared.layers if layer <= deepest), shape=shape)


def describe(prepared: AdapterJob, **more: Any) -> dict[str, Any]:
    """What a run would touch and take."""
    job = prepared.job
    plan = _unlearned(prepared).plan(job.checkpoint.config, list(job.checkpoint.tensors))
    return measured_run.describe(
        job, plan, gradient_steps=prepared.settings.steps, layers_adapted=len(prepared.layers), **more
    )  # fmt: skip


def run(prepared: AdapterJob, teach: Teach, how: str, events: Events) -> Finished:
    """Do the whole run. The run's folder gets ``checkpoint/``, ``report.html`` and ``events.jsonl``.

    Args:
        teach: Makes the lessons from the loaded base.
        how: What was done, as it stands in titles: "erased with ELM".
    """
    job, settings = prepared.job, prepared.settings
    work = start_folder(job.out, settings)
    events.path = job.out / "events.jsonl"
    base, edit = _study_base(prepared, teach, work, events)
    learned = json.loads((work / "learned.json").read_text(encoding="utf-8"))
    trained = torch.load(work / "logits.pt", weights_only=True)

    def inspect(loaded: LoadedModel, subject: ModelUnderTest) -> Inspection:
        divergence = _divergence(trained, loaded.model)
        if not divergence <= MERGED_KL:
            raise EditError(
                f"the merged checkpoint differs from base and adapter by {divergence:.3f} nats a token; "
                f"at most {MERGED_KL} is rounding. Train with smaller updates or edit a checkpoint of higher precision"
            )
        return Inspection(about={"merged_kl": divergence})

    about = {
        "edited": {
            "how": how, **({} if prepared.whole else {"rank": settings.rank, "alpha": settings.alpha}),
            "layers": list(prepared.layers),
            "about": f"on {len(prepared.shape.modules)} linear modules of {len(prepared.layers)} layers",
        },
        **learned,
    }  # fmt: skip
    finished = measured_run.publish(job, edit, base, about, events, inspect, lambda folder: _add_files(work, folder))
    shutil.rmtree(work)
    return finished


def _study_base(prepared: AdapterJob, teach: Teach, work: Path, events: Events) -> tuple[Measured, WeightEdit]:
    """Measure the base, then train on it; a killed run goes on where its training was."""
    job = prepared.job
    loaded = measured_run.load(job, job.source, "base", events)
    measured = measured_run.measure_base(job, loaded, events)
    if prepared.settings.base_bits == 4:
        del loaded
        gc.collect()
        with events.stage("load the base in 4 bits"):
            loaded = load_model(job.source, job.device, job.dtype, bits=4)
    edit = measured_run.kept_edit(work / "edit", lambda: _learn(prepared, loaded, teach, work, events), load_edit)
    del loaded
    gc.collect()
    return measured, edit


def schedule_of(settings: AdapterSettings, save_every: int) -> Schedule:
    """How the settings say that an adapter is trained."""
    return Schedule(
        settings.steps, settings.batch_size // settings.gradient_accumulation_steps, settings.learning_rate, settings.seed,
        decay=settings.schedule, warmup_steps=min(10, settings.steps // 10), max_grad_norm=settings.max_grad_norm, beta2=0.999,
        gradient_accumulation_steps=settings.gradient_accumulation_steps, save_every=save_every,
    )  # fmt: skip


def _learn(prepared: AdapterJob, loaded: LoadedModel, teach: Teach, work: Path, events: Events) -> WeightEdit:
    job, settings = prepared.job, prepared.settings
    lessons = teach(loaded, events, work)
    if settings.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    with being_trained(prepared, loaded.model) as tuned:
        model = tuned.model
        with events.stage("train", settings.steps) as stage, lessons.during(model):
            fit(
                model, lessons.groups, stage, work / "training", lessons.loss, schedule_of(settings, 50), lessons.collate,
                after_step=lessons.at_step,
            )  # fmt: skip
        model.eval()
        if settings.gradient_checkpointing:
            loaded.model.gradient_checkpointing_disable()
        rows = list(lessons.rows)
        torch.save({"rows": [list(row) for row in rows], "log_p": _log_p(model, rows)}, work / "logits.pt")
        if not prepared.whole:
            # A local path would be published with the adapter.
            model.peft_config["default"].base_model_name_or_path = job.source.name
            model.save_pretrained(work / ADAPTER, save_embedding_layers=False)
        found = {"training": lessons.training, **lessons.about, **lessons.after(model)}
        (work / "learned.json").write_text(json.dumps(found), encoding="utf-8")
        provenance = {
            "source": job.recipe, "base": job.source.describe(), "seed": settings.seed,
            "concept": {"ref": job.concept.ref, "sha256": job.concept.sha256},
        }  # fmt: skip
        return tuned.edit(provenance)


@dataclass(frozen=True)
class Tuned:
    """A model while it is trained."""

    model: Any
    edit: Callable[[dict[str, Any]], WeightEdit]
    """What was learned so far, as data; takes its provenance."""


@contextmanager
def being_trained(prepared: AdapterJob, model: Any) -> Iterator[Tuned]:
    """A fresh adapter on the model, or its own weights; afterwards the model is the base again."""
    if prepared.whole:
        with weights_trained(model, prepared.shape.modules) as before:
            yield Tuned(
                model, lambda provenance: _as_edit(prepared, DenseUpdate, learned_deltas(model, before), provenance)
            )
        return
    adapted = attach(model, prepared.shape, prepared.settings.seed)
    try:
        yield Tuned(
            adapted,
            lambda provenance: _as_edit(prepared, LowRankUpdate, learned_factors(adapted, prepared.shape), provenance),
        )
    finally:
        detach(adapted)


@torch.no_grad()
def _log_p(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    inner = causal_model(model)
    inputs = pad_right(rows, inner.device)
    last = inputs["attention_mask"].sum(-1) - 1
    logits = inner(**inputs, use_cache=False).logits
    return logits[torch.arange(len(rows)), last].float().log_softmax(-1).cpu()


def _divergence(trained: dict[str, Any], model: Any) -> float:
    """KL(base and adapter || merged) after each kept row, in nats."""
    own, before = _log_p(model, trained["rows"]), trained["log_p"]
    return float((before.exp() * (before - own)).sum(-1).mean())


def _add_files(work: Path, folder: Path) -> None:
    """The adapter and directions, where there are any."""
    if (work / ADAPTER).exists():
        target = folder / ADAPTER
        target.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(work / ADAPTER / name, target / name)
    if (work / DIRECTIONS).exists():
        (folder / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(work / DIRECTIONS, folder / FOLDER / DIRECTIONS)


def _modules(job: Job, settings: AdapterSettings, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Linear modules by name, from the model's skeleton: no weight is read."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(job.source.folder)
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config)
    return adapter_modules(skeleton, job.row, layers, settings.modules)


def _unlearned(prepared: AdapterJob) -> WeightEdit:
    """The update's names before it has values."""
    nothing = Factors(torch.zeros(0, 0), torch.zeros(0, 0))
    return _as_edit(prepared, LowRankUpdate, {f"{name}.weight": nothing for name in prepared.shape.modules}, {})


def _as_edit(
    prepared: AdapterJob, kind: type[LowRankUpdate] | type[DenseUpdate], parts: dict[str, Any], provenance: dict[str, Any]
) -> LowRankUpdate | DenseUpdate:  # fmt: skip
    config = prepared.job.checkpoint.config
    return kind(parts, config["model_type"], residual_width(config), prepared.job.layers, provenance)
