"""A whole run that trains an adapter: measure the base, train, merge, measure and publish the checkpoint."""

import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ...artifacts.checkpoints.directions import FILE as DIRECTIONS
from ...artifacts.checkpoints.manifest import FOLDER
from ...artifacts.events import Events
from ...artifacts.files.parsed import read_object
from ...artifacts.files.tensors import load_safetensors
from ...artifacts.files.written import read_sealed, write_sealed
from ...artifacts.models.load import LoadedModel, load_model
from ...editing.edits.base import WeightEdit
from ...editing.edits.dense import DenseUpdate, learned_deltas, weights_trained
from ...editing.edits.low_rank import LowRankUpdate
from ...editing.errors import EditError
from ...editing.modules import causal_model
from ...editing.training.adapters import attach, detach, learned_factors, loads_in_peft, targets_as_given
from ...eval.inference.batches import read_in_batches
from ...eval.inference.likelihood import batch_budget, pad_right
from ...eval.model_under_test import ModelUnderTest
from . import measured_run
from .adapter_job import AdapterJob, products_of, schedule_of
from .base_figures import Measured
from .measured_run import Finished, Inspection
from .memory_plan import step_in_parts
from .memory_sizes import Rows
from .objective import Objective
from .ranks import processes
from .sharded_run import fit_objective
from .step_parts import Room
from .tokens import Row

ADAPTER = "adapter"
REPORT = "learned.json"
PREDICTIONS, PREDICTIONS_IN_FULL = "logits.pt", "logits-in-full-precision.pt"
MERGED_KL = 0.05
"""Nats by which the merged checkpoint may differ from base and adapter: rounding to its stored type, no more."""


class Training(Objective):
    """What a recipe trains on, its loss, and what it reports; a recipe gives the first three and overrides what it
    needs."""

    checked_rows: Sequence[Row]
    """Sequences on which the merged checkpoint must agree with base and adapter."""

    step_rows: Rows | None = None
    """The largest step: how many sequences it reads, and the tokens of the longest. Without it memory is not planned, and
    a step is computed in smaller parts only once memory runs out."""
    deepest: int | None = None
    """The last layer that the loss computes; None computes all."""

    @abstractmethod
    def report(self, model: Any) -> dict[str, Any]:
        """Sections of ``eval.json``: how it was trained, and what shows on the trained model, adapter on."""

    def objective(self) -> Objective:
        """What is minimized; of a training that several processes can share, without the model."""
        return self

    def begin(self, model: Any) -> None:
        """Change the weights to where training begins."""
        return

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, with their number."""
        return

    def looks(self, step: int) -> bool:
        """Whether ``after_step`` does anything after this step; asked of a training that several processes share."""
        return False


MakeTraining = Callable[[LoadedModel, Events, Path], Training]
"""Prepares a training with the loaded base; the run's working folder is there to keep files in."""


def run(job: AdapterJob, how: str, make_training: MakeTraining, events: Events) -> Finished:
    """Do the whole run. The run's folder gets ``checkpoint/``, ``report.html`` and ``events.jsonl``.

    Args:
        how: What was done, as it stands in titles: "erased with ELM".
        make_training: Called once the base is measured; not called where a resumed run has trained already.
    """
    work = measured_run.start(job.run)
    events.path = job.run.out / "events.jsonl"
    base, edit = _study_base(job, make_training, work, events)
    report = read_sealed(work / REPORT)
    # Of a base in 4 bits the predictions in full precision are what the merge must agree with.
    full = work / PREDICTIONS_IN_FULL
    trained = torch.load(full if full.exists() else work / PREDICTIONS, weights_only=True)

    def inspect(loaded: LoadedModel, subject: ModelUnderTest) -> Inspection:
        return Inspection(about={"merged_kl": _checked_divergence(trained, loaded.model)})

    shape = {} if job.whole else {"rank": job.shape.rank, "alpha": job.shape.alpha}
    where = f"on {job.shape.describe()} of {len(job.layers)} layers"
    about = {"edited": {"how": how, **shape, "layers": list(job.layers), "about": where}, **report}
    finished = measured_run.publish(
        job.run, edit, base, about, events, inspect, lambda folder: _add_files(work, folder)
    )
    shutil.rmtree(work)
    return finished


def _study_base(
    job: AdapterJob, make_training: MakeTraining, work: Path, events: Events
) -> tuple[Measured, WeightEdit]:
    """Measure the base, then train on it; a killed run goes on where its training was."""
    loaded = measured_run.load(job.run, job.run.source, "base", events)
    measured = measured_run.measure_base(job.run, loaded, events)
    # Only training uses 4 bits: the base was measured in full precision, as the edited model will be.
    if job.base_bits == 4:
        del loaded
        with events.stage("load the base in 4 bits"):
            loaded = load_model(
                job.run.source, job.run.device, job.run.dtype, bits=4, prompts=job.settings.prompt_format()
            )
    beside = (REPORT, PREDICTIONS, PREDICTIONS_IN_FULL, DIRECTIONS, *(() if job.whole else (ADAPTER,)))

    def learn_within_budget() -> WeightEdit:
        nonlocal loaded
        edit = learn(job, loaded, make_training, work, events)
        if job.settings.kl_budget is None:
            return edit
        if job.base_bits == 4:
            loaded = measured_run.load(job.run, job.run.source, "base in full precision", events)
        base = loaded

        def at_strength(strength: float) -> None:
            # The checkpoint must agree with the base at this strength, and so does the adapter beside it.
            store_predictions(base.model, None, work)
            _scale_adapter(work, strength)

        return measured_run.within_budget(job.run, edit, base, events, at_strength)

    edit = measured_run.learned_edit(work, learn_within_budget, beside)
    del loaded
    if job.base_bits == 4 and job.settings.kl_budget is None:
        _predict_in_full_precision(job, work, events)
    return measured, edit


def _scale_adapter(work: Path, strength: float) -> None:
    """Give the adapter the strength that was chosen for the edit."""
    from safetensors.torch import save_file

    file = work / ADAPTER / "adapter_model.safetensors"
    if file.exists():
        tensors = load_safetensors(file)
        scaled = {name: one * strength if ".lora_B." in name else one for name, one in tensors.items()}
        save_file(scaled, file, {"format": "pt"})


def learn(job: AdapterJob, loaded: LoadedModel, make_training: MakeTraining, work: Path, events: Events) -> WeightEdit:
    """Train on the loaded base, which is the base again afterwards; the working folder gets what a run needs later."""
    training = make_training(loaded, events, work)
    parts, checkpointing = _planned(job, training, events)
    if checkpointing:
        # The reentrant form passes on no gradient where a layer's inputs need none, as behind frozen embeddings.
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    with being_trained(job, loaded.model) as tuned:
        training.begin(tuned.model)
        with events.stage("train", job.settings.steps) as stage:
            room = fit_objective(
                tuned.model,
                training.objective(),
                stage,
                work / "training",
                schedule_of(job, save_every=50),
                job.run.row.layers,
                after_step=training.after_step,
                looks=training.looks,
                parts=parts,
                products=products_of(job),
            )
        room.checkpointing |= checkpointing and not job.settings.gradient_checkpointing
        tuned.model.eval()
        if checkpointing:
            loaded.model.gradient_checkpointing_disable()
        # Before the edit is stored: a resumed run that finds the edit reads these files and trains nothing.
        _write_trained(job, tuned.model, training, room, work)
        concept = job.run.concept
        provenance = {
            "source": job.run.recipe,
            "base": job.run.source.describe(),
            "seed": job.settings.seed,
            "concept": {"ref": concept.ref, "sha256": concept.sha256},
        }
        return tuned.edit(provenance)


def _planned(job: AdapterJob, training: Training, events: Events) -> tuple[int, bool]:
    """In how many parts a step is computed, and whether activations are computed again; said where that is not as set."""
    asked = job.settings.gradient_checkpointing
    if training.step_rows is None:
        return 1, asked
    step = step_in_parts(job, training.step_rows, training.deepest)
    if step is None or (step.parts == 1 and step.checkpointing == asked):
        return 1, asked
    again = " and gradient checkpointing" if step.checkpointing and not asked else ""
    count = "one part" if step.parts == 1 else f"{step.parts} parts"
    events.note(f"a step does not fit into memory at once: it is computed in {count}{again}, with the same gradient")
    return step.parts, step.checkpointing


def _predict_in_full_precision(job: AdapterJob, work: Path, events: Events) -> None:
    """Store what the base in full precision predicts with the adapter: that is what is merged, not the 4-bit base."""
    loaded = measured_run.load(job.run, job.run.source, "base in full precision", events)
    with targets_as_given():
        adapted = PeftModel.from_pretrained(loaded.model, work / ADAPTER).eval()
    store_predictions(adapted, None, work)


def store_predictions(model: Any, rows: Sequence[Row] | None, work: Path) -> None:
    """Keep what a model with its adapter predicts after some rows, or after those that are kept already, for the
    comparison with the merged checkpoint."""
    stored = PREDICTIONS if rows is not None else PREDICTIONS_IN_FULL
    kept = (
        [list(row) for row in rows] if rows is not None else torch.load(work / PREDICTIONS, weights_only=True)["rows"]
    )
    torch.save({"rows": kept, "log_p": _log_p(model, kept)}, work / stored)


def _write_trained(job: AdapterJob, model: Any, training: Training, room: Room, work: Path) -> None:
    """What the run needs of the trained model once it is unloaded: the adapter, some predictions, the report."""
    store_predictions(model, training.checked_rows, work)
    if not job.whole:
        # A local path would be published with the adapter.
        model.peft_config["default"].base_model_name_or_path = job.run.source.name
        # By default peft would look for the base on the Hub, to see whether its vocabulary was changed.
        model.save_pretrained(work / ADAPTER, save_embedding_layers=False)
    report = training.report(model)
    # How a step was computed changes no more than rounding, and is recorded all the same.
    report["training"] |= room.describe()
    if (count := processes()) > 1 and job.whole:
        report["training"]["processes"] = count
    if job.optimizer != "adamw":
        report["training"]["optimizer"] = job.optimizer
    write_sealed(work / REPORT, report)


@dataclass(frozen=True)
class Tuned:
    """A model while it is trained."""

    model: Any
    edit: Callable[[dict[str, Any]], WeightEdit]
    """What was learned so far, as data; takes its provenance."""


@contextmanager
def being_trained(job: AdapterJob, model: Any) -> Iterator[Tuned]:
    """A fresh adapter on the model, or its own weights; afterwards the model is the base again."""
    if job.whole:
        with weights_trained(model, job.shape.weights) as before:
            yield Tuned(model, lambda provenance: job.edit(DenseUpdate, learned_deltas(model, before), provenance))
        return
    adapted = attach(model, job.shape, job.settings.seed)
    try:
        yield Tuned(
            adapted, lambda provenance: job.edit(LowRankUpdate, learned_factors(adapted, job.shape), provenance)
        )
    finally:
        detach(adapted)


@torch.no_grad()
def _log_p(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of the token after each row [rows, v], on the CPU."""
    inner = causal_model(model)
    found: dict[int, Tensor] = {}

    def read(batch: list[int]) -> Tensor:
        inputs = pad_right([rows[place] for place in batch], inner.device)
        last = inputs["attention_mask"].sum(-1).cpu() - 1
        # Logits of all positions would be the largest tensor of the run.
        kept, place = last.unique(return_inverse=True)
        logits = inner(**inputs, use_cache=False, logits_to_keep=kept).logits
        return logits[torch.arange(len(batch)), place].float().log_softmax(-1).cpu()

    for batch, log_p in read_in_batches([len(row) for row in rows], batch_budget(inner), read):
        found |= dict(zip(batch, log_p, strict=True))
    return torch.stack([found[place] for place in range(len(rows))])


def _checked_divergence(trained: dict[str, Any], model: Any) -> float:
    """KL(base and adapter || merged) after each checked row, in nats.

    Raises:
        EditError: It is more than rounding.
    """
    merged, before = _log_p(model, trained["rows"]), trained["log_p"]
    divergence = float((before.exp() * (before - merged)).sum(-1).mean())
    # Negated, so that NaN is refused too.
    if not divergence <= MERGED_KL:
        raise EditError(
            f"the merged checkpoint differs from base and adapter by {divergence:.3f} nats a token; "
            f"at most {MERGED_KL} is rounding. Train with smaller updates or edit a checkpoint of higher precision"
        )
    return divergence


def _loads_in_peft(work: Path, folder: Path) -> bool:
    saved = read_object(work / ADAPTER / "adapter_config.json")
    modules, experts = saved.get("target_modules"), saved.get("target_parameters")
    model_type = read_object(folder / "config.json").get("model_type")
    # In some models of experts peft would put it elsewhere; the checkpoint itself holds the update in any case.
    return isinstance(modules, list) and loads_in_peft(str(model_type), modules, experts or ())


def _add_files(work: Path, folder: Path) -> None:
    """The adapter, if peft can load it, and directions, where there are any."""
    if (work / ADAPTER).exists() and _loads_in_peft(work, folder):
        target = folder / ADAPTER
        target.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(work / ADAPTER / name, target / name)
    if (work / DIRECTIONS).exists():
        (folder / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(work / DIRECTIONS, folder / FOLDER / DIRECTIONS)
