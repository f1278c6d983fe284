"""What every editing recipe shares: measuring base and edited alike, publishing the result."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.edits import save_edit
from ...artifacts.checkpoints.export import export_edit
from ...artifacts.checkpoints.manifest import FOLDER, write_manifest
from ...artifacts.checkpoints.staging import staged_folder
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel, load_model
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
from ...editing.edits.base import WeightEdit
from ...editing.training.packing import packing
from ...eval.inference.generation import Reply, set_aside
from ...eval.items import clusters_of
from ...eval.measurements.fluency import novice_text, reverse_perplexity
from ...eval.measurements.table import measure, workload
from ...eval.model_under_test import Baseline, ModelUnderTest
from ...eval.statistics import Scores
from . import kl_budget
from .base_figures import BaseFigures, Measured
from .learned_edit import learned_edit, start
from .measured_job import Job, MeasuredSettings, check, check_plan, describe
from .run_content import run_content
from .story import tell

__all__ = [
    "Finished",
    "Inspection",
    "Job",
    "Measured",
    "MeasuredSettings",
    "check",
    "check_plan",
    "describe",
    "learned_edit",
    "load",
    "measure_base",
    "measure_subject",
    "publish",
    "start",
    "subject_of",
    "within_budget",
]

SAMPLES = 40
EDITED = "the edited checkpoint"


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
    return ModelUnderTest(loaded.model, loaded.tokenizer, job.measured, job.settings.measuring(), baseline)


def measure_subject(job: Job, subject: ModelUnderTest, name: str, events: Events) -> list[Scores]:
    """Every measurement of the table."""
    with events.stage(f"measure {name}", workload(job.measured, subject.settings)) as stage:
        subject.advance = stage.advance
        # What questions begin with is read once for all of them, where the model can.
        with packing(subject.model):
            scores = measure(subject)
        stage.advance(0, **{f"{item.name}/{item.split}": item.value() for item in scores if not item.is_empty})
    return scores


def measure_base(job: Job, loaded: LoadedModel, events: Events) -> Measured:
    """The base's measurements and replies, and what the other models are compared with; an earlier run's where it
    measured the same."""
    figures = BaseFigures.of(job.source, job.dtype, job.device, job.measured, job.settings.measuring())
    known = None if job.settings.fresh else figures.recall()
    if known is not None:
        events.note("the base was measured by an earlier run; --set fresh=true measures it again")
        return known
    measured = _measure_base(job, loaded, events)
    figures.keep(measured)
    return measured


def _measure_base(job: Job, loaded: LoadedModel, events: Events) -> Measured:
    subject = subject_of(job, loaded)
    scores = measure_subject(job, subject, "base", events)
    replies = _replies(subject)
    if _is_knowledge(job):
        with events.stage("read the base's own replies"), packing(loaded.model):
            scores.append(_judged(job, loaded, replies))
            ids, novices = novice_text(subject)
            if novices:
                scores.append(reverse_perplexity(loaded.model, loaded.tokenizer, ids, novices, "novice"))
    has_template = bool(loaded.tokenizer.chat_template)
    return Measured(scores, replies, subject.baseline(), has_template, set_aside(loaded.model))


def within_budget(
    job: Job,
    edit: WeightEdit,
    loaded: LoadedModel,
    events: Events,
    at_strength: Callable[[float], None] = lambda _: None,
    of: str = "base",
) -> WeightEdit:
    """A learned edit at the strength that ``kl_budget`` allows; as it was learned, where none is set.

    Args:
        loaded: The base, which is unchanged afterwards.
        at_strength: Called with the strength while the chosen edit is applied to the model.
        of: What the loaded model is, where it is not the run's base.
    """
    settings = job.settings
    if settings.kl_budget is None:
        return edit
    budget = kl_budget.Budget(settings.kl_budget, settings.max_strength, settings.kl_prompts, of)
    return kl_budget.fit(edit, budget, loaded, job.checkpoint, job.concept, events, at_strength, job.measured)


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
        content = run_content(
            job, edit, export, about, inspection.about, samples(base.replies, edited.replies, SAMPLES)
        )
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
        if doubts := [*on_prompts, *not_held(job.measured), *not_measured(named), *dominated(named)]:
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
    with packing(loaded.model):
        for name, measured in others.items():
            scores[name].append(_judged(job, loaded, measured.replies))
    del loaded


def _judged(job: Job, loaded: LoadedModel, replies: dict[str, list[Reply]]) -> Scores:
    prompts = [prompt for prompt in job.measured.prompts if prompt.split == "concept"]
    ids, clusters = [prompt.id for prompt in prompts], clusters_of(job.measured, prompts)
    return reverse_perplexity(loaded.model, loaded.tokenizer, ids, replies["concept"], clusters=clusters)


def _is_knowledge(job: Job) -> bool:
    return job.concept.about.kind == "knowledge" and any(prompt.split == "concept" for prompt in job.measured.prompts)


def _replies(subject: ModelUnderTest) -> dict[str, list[Reply]]:
    return {split: subject.replies(split) for split in ("concept", "neutral")}
