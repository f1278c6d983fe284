"""What every editing recipe shares: checking a request, measuring base and edited alike, publishing the result."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from ...artifacts.checkpoints.edits import load_edit, save_edit
from ...artifacts.checkpoints.export import Export, check_disk, check_editable, export_edit, required_bytes
from ...artifacts.checkpoints.heads import plan_edit
from ...artifacts.checkpoints.left import parts_left
from ...artifacts.checkpoints.manifest import FOLDER, write_manifest
from ...artifacts.checkpoints.proof import Proof, check_proved
from ...artifacts.checkpoints.read import ITEM_SIZES, Checkpoint, open_checkpoint
from ...artifacts.checkpoints.staging import staged_folder
from ...artifacts.concepts import load_concept
from ...artifacts.events import Events
from ...artifacts.files.opened import Telling
from ...artifacts.files.written import SEAL, check_sealed, files_in, seal_files
from ...artifacts.models.dequantized import check_loadable
from ...artifacts.models.find import find_model
from ...artifacts.models.load import LoadedModel, choose_device, choose_dtype, load_model, load_tokenizer
from ...artifacts.models.source import ModelSource
from ...artifacts.reporting import card, report
from ...artifacts.reporting.results import (
    SubjectName,
    about_prompts,
    dominated,
    not_held,
    not_measured,
    samples,
    summarize_all,
    write_results,
)
from ...editing.architectures import architecture_of, layer_count
from ...editing.edits.base import Plan, WeightEdit
from ...editing.errors import RequestError
from ...editing.wiring.row import Architecture
from ...eval.concept import Concept
from ...eval.inference.generation import Reply, set_aside
from ...eval.items import clusters_of, measured_on
from ...eval.measurements.fluency import novice_text, reverse_perplexity
from ...eval.measurements.table import measure, workload
from ...eval.model_under_test import Baseline, EvalSettings, ModelUnderTest
from ...eval.statistics import Scores
from .budgets import BudgetSettings
from .run_folder import free_folder, refuse_taken, start_folder
from .run_inputs import checksums
from .story import tell

SAMPLES = 40
EDITED = "the edited checkpoint"
LEARNED = "edit"
"""In the working folder: the edit, once it is learned."""


class MeasuredSettings(BudgetSettings):
    """Settings of every recipe that measures what its edit did."""

    max_new_tokens: int = Field(24, ge=1, le=4096)
    """Longest reply to measure, in tokens (greedy decoding). More take longer."""
    kl_prompts: int = Field(64, ge=1)
    """Number of neutral prompts, and of retain texts, on which the KL divergence from the base is measured."""
    questions: int = Field(0, ge=0)
    """Most questions, and most retain texts, to measure in each split, drawn at random; 0 takes all. Fewer widen the
    intervals."""
    reference: str | None = None
    """Model that was never trained on the concept (retrained reference), measured beside base and edited."""

    def measuring(self) -> EvalSettings:
        """How much is measured."""
        return EvalSettings(self.max_new_tokens, self.kl_prompts, self.questions, prompts=self.prompt_format())


@dataclass(frozen=True)
class Job:
    """A request that was checked as far as it can be without reading a weight."""

    recipe: str
    settings: MeasuredSettings
    source: ModelSource
    checkpoint: Checkpoint
    concept: Concept
    row: Architecture
    device: torch.device
    dtype: torch.dtype
    reference: ModelSource | None
    out: Path
    proof: Proof | None = None
    """Of a row that was derived: that an edit by it leaves nothing of a direction."""

    @property
    def layers(self) -> int:
        return layer_count(self.checkpoint.config)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Measured:
    """What was measured on one model, all that is needed of it once it is unloaded."""

    scores: list[Scores]
    replies: dict[str, list[Reply]]
    baseline: Baseline | None = None
    """Of the base: what others are compared with."""
    chat_template: bool = True
    """Whether the model has a chat template; otherwise prompts are plain texts."""
    set_aside: dict[str, Any] = field(default_factory=dict)
    """Of the base: what its generation_config asks for, which replies were measured without."""


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    out: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """What a recipe itself finds out about its edited checkpoint."""

    scores: list[Scores] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


Inspect = Callable[[LoadedModel, ModelUnderTest], Inspection]


def check(recipe: str, settings: MeasuredSettings, needed: Sequence[str], *, resume: bool) -> Job:
    """Check names, files and memory before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    concept = load_concept(settings.concept)
    concept.require(recipe, *needed)
    out = settings.out or free_folder(recipe)
    if not resume:
        refuse_taken(out)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = find_model(settings.model, to_edit=True)
    checkpoint = open_checkpoint(source.folder)
    row, proof = architecture_of(checkpoint.config), check_proved(checkpoint.config)
    check_loadable(checkpoint, device, dtype)
    reference = find_model(settings.reference) if settings.reference else _builtin_reference(settings, concept)
    if settings.template:
        # Whether the templates know these variables; otherwise said only when each model is loaded.
        for one in (source, *([reference] if reference else [])):
            load_tokenizer(one, settings.prompt_format())
    return Job(recipe, settings, source, checkpoint, concept, row, device, dtype, reference, out, proof)


def check_plan(job: Job, plan: Plan) -> None:
    """Check that the declared tensors can be edited and that the result fits the disk."""
    check_editable(job.checkpoint, plan)
    check_disk(job.out, required_bytes(job.checkpoint, plan))


def describe(job: Job, plan: Plan, **more: Any) -> dict[str, Any]:
    """What a run would touch and take."""
    sizes = job.checkpoint.tensors
    elements = sum(tensor.size // ITEM_SIZES[tensor.dtype] for tensor in sizes.values())
    return {
        "recipe": job.recipe,
        "out": str(job.out),
        "base": job.source.describe(),
        "concept": job.concept.ref,
        "made": list(job.concept.made),
        "budget": job.settings.budget_in_words(),
        "row": _row_in_words(job.proof),
        "tensors_to_change": len(plan.declared),
        "tensors": len(sizes),
        "tensor_added": plan.untied,
        "bytes_to_change": sum(sizes[name].size for name in plan.declared),
        "bytes_to_write": job.checkpoint.size,
        "memory_bytes": elements * job.dtype.itemsize,
        "dtype": job.dtype_name,
        "device": str(job.device),
        "items_measured": workload(job.concept, job.settings.measuring()),
        **more,
        "first_tensors": list(plan.declared[:3]),
    }


def derived_row(proof: Proof | None) -> dict[str, Any]:
    """What is recorded of a row that was derived."""
    if proof is None:
        return {}
    kept = {key: getattr(proof, key) for key in ("model_type", "row", "residual", "place", "transformers")}
    return {"architecture": {**kept, "proof": "derived, proved on a small copy"}}


def _row_in_words(proof: Proof | None) -> str:
    if proof is None:
        return "in the table"
    return f"derived, proved on a small copy ({proof.residual:.0e} of a direction is left)"


def load(job: Job, source: ModelSource, name: str, events: Events) -> LoadedModel:
    """Load a model for measuring or learning."""
    if name == "base":
        for sentence in job.concept.made:
            events.note(f"made of the pack: {sentence}")
        if job.proof:
            events.note("row: derived, proved on a small copy")
    with events.stage(f"load {name}"):
        return load_model(source, job.device, job.dtype, prompts=job.settings.prompt_format())


def subject_of(job: Job, loaded: LoadedModel, baseline: Baseline | None = None) -> ModelUnderTest:
    """A loaded model under measurement."""
    return ModelUnderTest(loaded.model, loaded.tokenizer, job.concept, job.settings.measuring(), baseline)


def measure_subject(job: Job, subject: ModelUnderTest, name: str, events: Events) -> list[Scores]:
    """Every measurement of the table."""
    with events.stage(f"measure {name}", workload(job.concept, subject.settings)) as stage:
        subject.advance = stage.advance
        scores = measure(subject)
        stage.advance(0, **{f"{item.name}/{item.split}": item.value() for item in scores if not item.is_empty})
    return scores


def measure_base(job: Job, loaded: LoadedModel, events: Events) -> Measured:
    """The base's measurements and replies, and what the other models are compared with."""
    subject = subject_of(job, loaded)
    scores = measure_subject(job, subject, "base", events)
    replies = _replies(subject)
    if _is_knowledge(job):
        with events.stage("read the base's own replies"):
            scores.append(_judged(job, loaded, replies))
            ids, novices = novice_text(subject)
            if novices:
                scores.append(reverse_perplexity(loaded.model, loaded.tokenizer, ids, novices, "novice"))
    has_template = bool(loaded.tokenizer.chat_template)
    return Measured(scores, replies, subject.baseline(), has_template, set_aside(loaded.model))


def publish(
    job: Job,
    edit: WeightEdit,
    base: Measured,
    about: dict[str, Any],
    events: Events,
    inspect: Inspect,
    add_files: Callable[[Path], None] = lambda _: None,
) -> Finished:
    """Export the edit, measure the checkpoint as it stands on disk, and write everything that is published.

    Args:
        about: What the recipe adds to ``eval.json``; under ``edited``, what it says of its edit.
        inspect: Looks at the edited checkpoint before it is measured; may raise to stop the run.
        add_files: Writes further files into the checkpoint folder.
    """
    out, scores = job.out, {"base": list(base.scores)}
    with staged_folder(out / "checkpoint") as staging:
        with events.stage("export", job.checkpoint.size) as stage:
            export = export_edit(edit, job.checkpoint, staging, stage)
        add_files(staging)
        # As it stands on disk, because the checkpoint is what is published.
        edited, inspection = _measure_edited(job, base, staging, events, inspect)
        scores["edited"] = edited.scores
        others: dict[str, Measured] = {"edited": edited}
        if job.reference is not None:
            others["reference"] = _measure_reference(job, job.reference, base, events)
            scores["reference"] = others["reference"].scores
        if _is_knowledge(job):
            _judge(job, others, scores, events)
        changes = [asdict(change) for change in export.changes]
        save_edit(edit, staging / FOLDER)
        content = _about(job, edit, export, about, inspection.about, samples(base.replies, edited.replies, SAMPLES))
        content["decoding"] = {"as_shipped": False, "set_aside": base.set_aside}
        content["prompts"] = {**job.settings.prompt_format().as_json(), "chat_template": base.chat_template}
        named: dict[SubjectName, Sequence[Scores]] = {
            name: scores[name] for name in ("base", "edited", "reference") if name in scores
        }
        on_prompts = about_prompts(
            {"the base": base.replies, **{f"the {name} model": one.replies for name, one in others.items()}},
            template=base.chat_template,
            kind=job.concept.about.kind,
            tokens=job.settings.max_new_tokens,
        )
        if doubts := [*on_prompts, *not_held(job.concept), *not_measured(named), *dominated(named)]:
            content["warnings"] = [*content.get("warnings", ()), *doubts]
        results = write_results(staging, content, summarize_all(named), tell)
        card.write_card(staging, results, changes)
        write_manifest(
            staging,
            base=job.source.describe(),
            base_files=export.base_sha256,
            changes=export.changes,
            untied=export.untied,
            known=export.output_sha256,
            code_left_out=export.code_left_out,
            run=results["run"],
        )
        report.write_report(out / "report.html", results, changes)
    return Finished(out, results)


def start(job: Job) -> Path:
    """The run's working folder, with the request and the checksums of its inputs inside.

    Raises:
        RequestError: An unfinished run there was begun otherwise, or what it left was changed.
    """
    models = {"the base": job.source, "the reference": job.reference}
    work = start_folder(job.out, job.recipe, job.settings, checksums(job.settings, models, job.concept))
    if (work / LEARNED).exists():
        # Said now, not after the base was measured.
        _check_untouched(work)
    return work


def learned_edit(work: Path, learn: Callable[[], WeightEdit], beside: Sequence[str] = ()) -> WeightEdit:
    """The edit that an interrupted run left in its working folder; or a newly learned one, stored there.

    Args:
        beside: Files and folders of the working folder that ``learn`` writes, and a resumed run reads.

    Raises:
        RequestError: What the interrupted run left is no longer what it wrote.
    """
    folder = work / LEARNED
    if folder.exists():
        _check_untouched(work)
        return load_edit(folder)
    edit = learn()
    # Renamed when it is whole: a resumed run must not take half an edit for one that was learned.
    partial = work / "edit.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_edit(edit, partial)
    files = files_in(partial, f"{LEARNED}/")
    for name in beside:
        files |= files_in(work / name, f"{name}/") if (work / name).is_dir() else {}
        files |= {name: work / name} if (work / name).is_file() else {}
    seal_files(partial / SEAL, files)
    partial.rename(folder)
    return edit


def _check_untouched(work: Path) -> None:
    out, seal = work.parent, work / LEARNED / SEAL
    with Telling(RequestError, f"the run cannot go on; remove {out} and start it again").about(seal):
        gone, changed = check_sealed(seal, work)
    if gone or changed:
        name, what = (gone[0], "is gone") if gone else (changed[0], "was changed")
        raise RequestError(
            f"{work / name} {what} since the run wrote it, so what was learned is lost; remove {out} and start the run"
            " again"
        )


def _measure_edited(
    job: Job, base: Measured, folder: Path, events: Events, inspect: Inspect
) -> tuple[Measured, Inspection]:
    loaded = load(job, ModelSource("local", EDITED, folder), "edited", events)
    subject = subject_of(job, loaded, base.baseline)
    inspection = inspect(loaded, subject)
    scores = [*measure_subject(job, subject, "edited", events), *inspection.scores]
    measured = Measured(scores, _replies(subject))
    # The subject holds the model as well, and memory may have room for one model only.
    del loaded, subject.model
    return measured, inspection


def _measure_reference(job: Job, source: ModelSource, base: Measured, events: Events) -> Measured:
    loaded = load(job, source, "reference", events)
    subject = subject_of(job, loaded, base.baseline)
    measured = Measured(measure_subject(job, subject, "reference", events), _replies(subject))
    del loaded, subject.model
    return measured


def _judge(job: Job, others: dict[str, Measured], scores: dict[str, list[Scores]], events: Events) -> None:
    """Let the base read what the others said."""
    loaded = load(job, job.source, "base as the judge of replies", events)
    for name, measured in others.items():
        scores[name].append(_judged(job, loaded, measured.replies))
    del loaded


def _judged(job: Job, loaded: LoadedModel, replies: dict[str, list[Reply]]) -> Scores:
    prompts = [prompt for prompt in job.concept.prompts if prompt.split == "concept"]
    ids, clusters = [prompt.id for prompt in prompts], clusters_of(job.concept, prompts)
    return reverse_perplexity(loaded.model, loaded.tokenizer, ids, replies["concept"], clusters=clusters)


def _is_knowledge(job: Job) -> bool:
    return job.concept.about.kind == "knowledge" and any(prompt.split == "concept" for prompt in job.concept.prompts)


def _replies(subject: ModelUnderTest) -> dict[str, list[Reply]]:
    return {split: subject.replies(split) for split in ("concept", "neutral")}


def _builtin_reference(settings: MeasuredSettings, concept: Concept) -> ModelSource | None:
    if settings.model == "builtin:testbed" and concept.ref == "builtin:potions":
        return find_model("builtin:testbed-reference")
    return None


def _about(
    job: Job,
    edit: WeightEdit,
    export: Export,
    about: dict[str, Any],
    inspection: dict[str, Any],
    shown: list[dict[str, str]],
) -> dict[str, Any]:
    """Everything in ``eval.json`` but the measurements; the same run on the same machine gives the same bytes."""
    settings, concept = job.settings, job.concept
    published_settings = settings.published("model", "concept", "out", "device", "dtype", "reference")
    return {
        "base": {**job.source.describe(), "computed_in": job.dtype_name},
        **derived_row(job.proof),
        "edited": {
            "method": job.recipe,
            "edit": edit.method,
            "tied": plan_edit(edit, job.checkpoint).tied,
            "tensors_declared": len(export.changes),
            **({"parts_left": left} if (left := parts_left(job.checkpoint)) else {}),
            "tensors_changed": sum(c.changed for c in export.changes),
            "bytes": export.bytes_written,
            **({"code_left_out": export.code_left_out} if export.code_left_out else {}),
            **({"stored_apart": True} if export.stored_apart else {}),
            **about.get("edited", {}),
        },
        "reference": None if job.reference is None else job.reference.describe(),
        "concept": {
            "ref": concept.ref,
            "name": concept.about.name,
            "kind": concept.about.kind,
            "description": concept.about.description,
            "license": concept.about.license,
            "source": concept.about.source,
            "sha256": concept.sha256,
            "made": list(concept.made),
            "decline_phrases": list(concept.about.decline_phrases),
            "measured_on": measured_on(concept),
        },
        **{key: value for key, value in about.items() if key != "edited"},
        **inspection,
        "samples": shown,
        "run": {
            "recipe": job.recipe,
            "seed": settings.seed,
            "budget": {"name": settings.budget, "set": settings.set_by_budget()},
            "settings": published_settings,
            "device": job.device.type,
            "dtype": job.dtype_name,
            "command": _command(job, published_settings),
        },
    }


def _command(job: Job, published_settings: dict[str, Any]) -> str:
    fields = type(job.settings).model_fields
    words = ["excise", "run", job.recipe, "--model", job.source.address, "--concept", job.concept.ref]
    words += ["--seed", str(job.settings.seed)]
    for key, value in published_settings.items():
        if key != "seed" and value != fields[key].default:
            # JSON is YAML too, so ``--set`` reads such a value back.
            words += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    return " ".join(words)
