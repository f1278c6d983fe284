"""Take a direction out of a model's weights: find it, choose it, remove it, check it, measure it, export it."""

import gc
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts.checkpoints.edits import load_edit
from ..artifacts.checkpoints.read import Checkpoint
from ..artifacts.events import Events
from ..artifacts.models.load import LoadedModel
from ..editing.architectures import layer_selection, residual_width
from ..editing.directions.difference_in_means import DIRECTION_SOURCES, Directions, stacked, unit, without_component
from ..editing.edits.base import Plan
from ..editing.edits.subspace_removal import Edit
from ..editing.errors import RequestError
from ..editing.hooks.leaks import Writes, check_leaks, compare_writes, measure_writes
from ..editing.hooks.residual_stream import added, residual_stream
from ..eval.concept import ContrastPair
from ..eval.inference.candidates import (
    BehaviourProbe,
    Candidate,
    Filters,
    KnowledgeProbe,
    Probe,
    choose,
    score_candidates,
)
from ..eval.inference.generation import encode_prompt
from ..eval.measurements.behaviour import induced
from ..eval.model_under_test import ModelUnderTest
from ..eval.statistics import Scores
from .common import measured_run
from .common.measured_run import Finished, Inspection, Job, Measured, MeasuredSettings
from .common.run_folder import start_folder
from .common.tokens import end_positions

RECIPE = "orthogonalize"


class OrthogonalizeSettings(MeasuredSettings):
    """Settings of weight orthogonalization (Arditi et al. 2024, unless another source is named)."""

    direction_source: Literal["difference_in_means"] = "difference_in_means"
    """How directions are learned from contrast.jsonl (section 2.3)."""
    train_pairs: int = 128
    """Contrast pairs that directions are learned from (appendix A: 128)."""
    validation_pairs: int = 32
    """Contrast pairs, and forget questions, that candidates are scored on (appendix A: 32)."""
    positions: int = 0
    """End-of-prompt positions to look at; 0 takes all tokens of the template after the user's text, 3 of a plain text."""
    point: int | None = None
    """Take the direction at this point of the stream (the input of that layer) instead of choosing one."""
    position: int | None = None
    """With point: the position, -1 for the last."""
    max_depth: float = 0.8
    """Candidates at or beyond this fraction of the layers are rejected (appendix C)."""
    max_kl: float = 0.1
    """Candidates that move neutral text by more nats a token are rejected (appendix C, there on one token)."""
    min_induce: float = 0.0
    """Candidates that induce the concept less than this when added are rejected (appendix C)."""
    layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "all"
    """Layers to edit: all, a number, a range such as 4-7, or fractions of depth such as 0.25-0.75."""
    strength: float | tuple[float, ...] = 1.0
    """Share of the component to remove; one number, or one a layer of the model."""
    embeddings: Literal["edit", "skip", "untie"] = "edit"
    """edit changes a tied unembedding too; skip leaves both; untie keeps the unembedding as a tensor of its own."""
    variant: Literal["plain", "norm_preserving", "projected"] = "plain"
    """norm_preserving keeps the norm of every column; projected first takes the negative prompts' mean out of the direction."""
    leak_tolerance: float = 0.05
    """Share of a sublayer's written component that may remain after the edit."""


@dataclass(frozen=True)
class OrthogonalizeJob:
    """A checked request and what it will change."""

    job: Job
    settings: OrthogonalizeSettings
    plan: Plan
    strengths: tuple[float, ...]


@dataclass(frozen=True)
class StudiedBase:
    """All that the run needs of the base model once it is unloaded."""

    edit: Edit
    measured: Measured
    writes: list[Writes]


def prepare(settings: OrthogonalizeSettings, *, resume: bool = False) -> OrthogonalizeJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    job = measured_run.check(RECIPE, settings, ["contrast"], resume=resume)
    strengths = _strengths(settings, job.layers)
    unlearned = _edit(settings, job.checkpoint, strengths, torch.eye(residual_width(job.checkpoint.config), 1))
    plan = unlearned.plan(job.checkpoint.config, list(job.checkpoint.tensors))
    measured_run.check_plan(job, plan)
    if len(job.concept.contrast) < 2 * settings.validation_pairs:
        raise RequestError(
            f"concept {job.concept.ref} has {len(job.concept.contrast)} contrast pairs, validation alone takes "
            f"{settings.validation_pairs}; lower validation_pairs or add pairs"
        )
    return OrthogonalizeJob(job, settings, plan, strengths)


def describe(prepared: OrthogonalizeJob) -> dict[str, Any]:
    """What a run would touch and take."""
    points = int(prepared.settings.max_depth * len(prepared.strengths))
    return measured_run.describe(prepared.job, prepared.plan, candidate_points=points, gradient_steps=0)


def run(prepared: OrthogonalizeJob, events: Events) -> Finished:
    """Do the whole run. The run's folder gets ``checkpoint/``, ``report.html`` and ``events.jsonl``."""
    job, settings = prepared.job, prepared.settings
    work = start_folder(job.out, settings)
    events.path = job.out / "events.jsonl"
    base = _study_base(prepared, work / "edit", events)

    def inspect(loaded: LoadedModel, subject: ModelUnderTest) -> Inspection:
        after = measure_writes(loaded.model, job.row, base.edit.basis, _leak_inputs(prepared, loaded))
        embedding_strength = 0.0 if settings.embeddings == "skip" else 1.0
        leaks = compare_writes(base.writes, after, prepared.strengths, embedding_strength)
        check_leaks(leaks, settings.leak_tolerance)
        scores = [_induce(prepared, loaded, base.edit, events, "induce on edited")]
        return Inspection(scores, {"leaks": [asdict(leak) for leak in leaks]})

    about = {
        "edited": {
            "how": "orthogonalized", "variant": settings.variant, "embeddings": settings.embeddings,
            "layer_strengths": list(prepared.strengths),
        },
        "direction": {**base.edit.provenance},
        "leak_tolerance": settings.leak_tolerance,
    }  # fmt: skip
    finished = measured_run.publish(job, base.edit, base.measured, about, events, inspect)
    shutil.rmtree(work)
    return finished


def _study_base(prepared: OrthogonalizeJob, kept: Path, events: Events) -> StudiedBase:
    """Measure the base, learn candidates, choose one; the edit is kept for a resumed run."""
    job = prepared.job
    loaded = measured_run.load(job, job.source, "base", events)
    measured = measured_run.measure_base(job, loaded, events)
    edit = measured_run.kept_edit(kept, lambda: _learn(prepared, loaded, events), load_edit)
    assert isinstance(edit, Edit), "the run itself saved it"
    measured.scores.append(_induce(prepared, loaded, edit, events, "induce on base"))
    writes = measure_writes(loaded.model, job.row, edit.basis, _leak_inputs(prepared, loaded))
    del loaded
    gc.collect()
    return StudiedBase(edit, measured, writes)


def _learn(prepared: OrthogonalizeJob, loaded: LoadedModel, events: Events) -> Edit:
    settings, concept = prepared.settings, prepared.job.concept
    pairs = list(concept.contrast)
    random.Random(f"excise contrast {settings.seed}").shuffle(pairs)
    validation, training = pairs[: settings.validation_pairs], pairs[settings.validation_pairs :]
    training = training[: settings.train_pairs]
    chat = concept.about.kind == "behaviour"
    positive, negative = (
        [encode_prompt(loaded.tokenizer, text, chat=chat) for text in texts]
        for texts in ([pair.positive for pair in training], [pair.negative for pair in training])
    )
    last = end_positions(settings.positions, [*positive, *negative], chat)
    positions = tuple(range(-last, 0))
    points = tuple(range(len(prepared.strengths) + 1))
    with events.stage("learn directions", len(positive) + len(negative)) as stage:
        source = DIRECTION_SOURCES[settings.direction_source]
        plus = _streams(prepared, loaded, positive, points, last, stage.advance)
        minus = _streams(prepared, loaded, negative, points, last, stage.advance)
        directions = source(plus, minus, points, positions)
    candidates, chosen, passed, probe = _choose(prepared, loaded, directions, validation, events)
    vector, negative_mean = stacked(directions, chosen.point, chosen.position)
    provenance = {
        "source": settings.direction_source, "point": chosen.point, "position": chosen.position,
        "norm": float(vector.norm()), "passed_filters": passed, "pairs": {"train": len(training), "validation": len(validation)},
        "probe": probe, "candidates": [asdict(candidate) for candidate in candidates],
        "base": prepared.job.source.describe(), "concept": {"ref": concept.ref, "sha256": concept.sha256}, "seed": settings.seed,
    }  # fmt: skip
    if settings.variant == "projected":
        vector = without_component(vector, negative_mean)
    return _edit(settings, prepared.job.checkpoint, prepared.strengths, unit(vector), provenance)


def _choose(
    prepared: OrthogonalizeJob,
    loaded: LoadedModel,
    directions: Directions,
    validation: Sequence[ContrastPair],
    events: Events,
) -> tuple[list[Candidate], Candidate, bool, dict[str, Any]]:
    settings = prepared.settings
    with events.stage("read the base on validation items"):
        probe = _probe(prepared, loaded, validation)
    filters = Filters(settings.max_depth, settings.max_kl, settings.min_induce)
    with events.stage("score candidates", len(directions.points) * len(directions.positions)) as stage:
        candidates = score_candidates(
            loaded.model, prepared.job.row, directions, probe, filters, len(prepared.strengths), stage.advance
        )
    about = probe.describe() | {"base_bypass": probe.base_bypass, "base_induce": probe.base_induce}
    if settings.point is None:
        return candidates, *choose(candidates, probe.base_bypass), about
    position = -1 if settings.position is None else settings.position
    wanted = [c for c in candidates if (c.point, c.position) == (settings.point, position)]
    if not wanted:
        raise RequestError(
            f"there is no candidate at point {settings.point}, position {position}; points 0 to {directions.points[-1]}, "
            f"positions {directions.positions[0]} to -1"
        )
    return candidates, wanted[0], wanted[0].rejected is None, about


def _probe(prepared: OrthogonalizeJob, loaded: LoadedModel, validation: Sequence[ContrastPair]) -> Probe:
    if prepared.job.concept.about.kind == "behaviour":
        return BehaviourProbe(loaded.model, loaded.tokenizer, validation, prepared.settings.max_new_tokens)
    # Group V is never shown to anything that learns or chooses an edit.
    questions = [q for q in prepared.job.concept.questions if q.split == "forget" and q.group == "T"]
    if not questions:
        raise RequestError(
            f"concept {prepared.job.concept.ref} has no forget questions of group T to choose a direction by"
        )
    return KnowledgeProbe(loaded.model, loaded.tokenizer, validation, questions[: prepared.settings.validation_pairs])


def _induce(prepared: OrthogonalizeJob, loaded: LoadedModel, edit: Edit, events: Events, name: str) -> Scores:
    """Add the direction as long as it was learned, where it was learned, and count what it brings about."""
    vector = edit.basis[:, 0] * edit.provenance["norm"]
    subject = measured_run.subject_of(prepared.job, loaded)
    with events.stage(name, len(subject.prompts("neutral"))) as stage:
        subject.advance = stage.advance
        with added(loaded.model, prepared.job.row, vector, edit.provenance["point"]):
            return induced(subject)


def _streams(
    prepared: OrthogonalizeJob,
    loaded: LoadedModel,
    rows: list[list[int]],
    points: tuple[int, ...],
    last: int,
    advance: Any,
) -> Iterator[Tensor]:
    size = 16
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield residual_stream(loaded.model, prepared.job.row, _padded(loaded, batch), points, last)
        advance(len(batch))


def _leak_inputs(prepared: OrthogonalizeJob, loaded: LoadedModel) -> list[dict[str, Tensor]]:
    chat = prepared.job.concept.about.kind == "behaviour"
    texts = [text for pair in prepared.job.concept.contrast[:16] for text in (pair.positive, pair.negative)]
    return [_padded(loaded, [encode_prompt(loaded.tokenizer, text, chat=chat) for text in texts])]


def _padded(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    encoded = [list(row) for row in rows]
    padded = loaded.tokenizer.pad({"input_ids": encoded}, padding=True, padding_side="left", return_tensors="pt")
    return {key: padded[key].to(loaded.device) for key in ("input_ids", "attention_mask")}


def _strengths(settings: OrthogonalizeSettings, count: int) -> tuple[float, ...]:
    chosen = set(layer_selection(settings.layers, count))
    given = settings.strength if isinstance(settings.strength, tuple) else (settings.strength,) * count
    if len(given) != count:
        raise RequestError(
            f"strength lists {len(given)} numbers, the model has {count} layers; give one number or {count}"
        )
    return tuple(value if layer in chosen else 0.0 for layer, value in enumerate(given))


def _edit(
    settings: OrthogonalizeSettings, checkpoint: Checkpoint, strengths: tuple[float, ...], basis: Tensor,
    provenance: dict[str, Any] | None = None,
) -> Edit:  # fmt: skip
    return Edit(
        basis, checkpoint.config["model_type"], strengths, settings.embeddings, settings.variant, provenance or {}
    )  # fmt: skip
