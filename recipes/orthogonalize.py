"""Take a direction out of a model's weights: find it, choose it, remove it, check it, measure it, export it."""

import gc
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts import card, report
from ..artifacts.checkpoints import DTYPES, Checkpoint, open_checkpoint
from ..artifacts.concepts import load_concept
from ..artifacts.edits import load_edit, save_edit
from ..artifacts.events import Events
from ..artifacts.export import Export, check_disk, check_editable, export_edit, required_bytes
from ..artifacts.manifest import FOLDER, write_manifest
from ..artifacts.models import (
    LoadedModel,
    ModelSource,
    check_memory,
    choose_device,
    choose_dtype,
    find_model,
    load_model,
)
from ..artifacts.results import SubjectName, samples, summarize_all, write_results
from ..artifacts.staging import staged_folder
from ..editing.activations import added, residual_stream
from ..editing.architectures import Architecture, architecture_of, layer_count, layer_selection, residual_width
from ..editing.directions import DIRECTION_SOURCES, Directions, stacked, unit, without_component
from ..editing.edit import Edit
from ..editing.errors import RequestError
from ..editing.leaks import Leak, Writes, check_leaks, compare_writes, measure_writes
from ..editing.weight_edit import Plan
from ..eval.behaviour import induced
from ..eval.candidates import (
    BehaviourProbe,
    Candidate,
    Filters,
    KnowledgeProbe,
    Probe,
    choose,
    score_candidates,
)  # fmt: skip
from ..eval.concept import Concept, ContrastPair
from ..eval.generation import Reply, encode_prompt
from ..eval.measure import measure, workload
from ..eval.statistics import Scores
from ..eval.subject import EvalSettings, Reference, Subject
from .request import RunRequest, free_folder, refuse_taken, start_folder

RECIPE = "orthogonalize"
PLAIN_TEXT_POSITIONS = 3
SAMPLES = 40


class OrthogonalizeSettings(RunRequest):
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
    reply_tokens: int = 24
    """Greedy tokens a reply."""
    kl_prompts: int = 64
    """Neutral prompts for the divergence from the base."""
    questions: int = 0
    """Questions and retain texts a split to measure, at most; 0 takes all."""
    never: str | None = None
    """A model that never knew the concept, measured beside base and edited."""


@dataclass(frozen=True)
class Prepared:
    """A request that was checked as far as it can be without reading a weight."""

    settings: OrthogonalizeSettings
    source: ModelSource
    checkpoint: Checkpoint
    concept: Concept
    row: Architecture
    plan: Plan
    strengths: tuple[float, ...]
    device: torch.device
    dtype: torch.dtype
    never: ModelSource | None
    out: Path


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    out: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class BaseFindings:
    """All that the run needs of the base model once it is unloaded."""

    edit: Edit
    scores: list[Scores]
    replies: dict[str, list[Reply]]
    reference: Reference
    writes: list[Writes]


def prepare(settings: OrthogonalizeSettings, *, resume: bool = False) -> Prepared:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    concept = load_concept(settings.concept)
    concept.require(RECIPE, "contrast")
    out = settings.out or free_folder(RECIPE)
    if not resume:
        refuse_taken(out)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = find_model(settings.model)
    checkpoint = open_checkpoint(source.folder)
    row = architecture_of(checkpoint.config)
    count = layer_count(checkpoint.config)
    strengths = _strengths(settings, count)
    unlearned = _edit(settings, checkpoint, strengths, torch.eye(residual_width(checkpoint.config), 1))
    plan = unlearned.plan(checkpoint.config, list(checkpoint.tensors))
    check_editable(checkpoint, plan)
    check_memory(checkpoint, device, dtype)
    check_disk(out, required_bytes(checkpoint, plan))
    if len(concept.contrast) < 2 * settings.validation_pairs:
        raise RequestError(
            f"concept {concept.ref} has {len(concept.contrast)} contrast pairs, validation alone takes "
            f"{settings.validation_pairs}; lower validation_pairs or add pairs"
        )
    never = find_model(settings.never) if settings.never else _builtin_never(settings, concept)
    return Prepared(settings, source, checkpoint, concept, row, plan, strengths, device, dtype, never, out)


def describe(prepared: Prepared) -> dict[str, Any]:
    """What a run would touch and take."""
    sizes, count = prepared.checkpoint.tensors, len(prepared.strengths)
    plan, settings = prepared.plan, prepared.settings
    elements = sum(tensor.size // DTYPES[tensor.dtype].itemsize for tensor in sizes.values())
    return {
        "recipe": RECIPE, "out": str(prepared.out), "base": prepared.source.describe(), "concept": prepared.concept.ref,
        "tensors_to_change": len(plan.declared), "tensors": len(sizes), "tensor_added": plan.untied,
        "bytes_to_change": sum(sizes[name].size for name in plan.declared), "bytes_to_write": prepared.checkpoint.size,
        "memory_bytes": elements * prepared.dtype.itemsize, "dtype": str(prepared.dtype).removeprefix("torch."),
        "device": str(prepared.device), "candidate_points": int(settings.max_depth * count),
        "items_measured": workload(prepared.concept, _eval_settings(settings)), "gradient_steps": 0,
        "first_tensors": list(plan.declared[:3]),
    }  # fmt: skip


def run(prepared: Prepared, events: Events) -> Finished:
    """Do the whole run. ``prepared.out`` gets ``checkpoint/``, ``report.html`` and ``events.jsonl``."""
    out, settings = prepared.out, prepared.settings
    work = start_folder(out, settings)
    events.path = out / "events.jsonl"

    base = _study_base(prepared, work / "edit", events)
    scores: dict[SubjectName, Sequence[Scores]] = {"base": base.scores}
    with staged_folder(out / "checkpoint") as staging:
        with events.stage("export", prepared.checkpoint.size) as stage:
            export = export_edit(base.edit, prepared.checkpoint, staging, stage)
        edited, leaks = _measure_edited(prepared, base, staging, events)
        scores["edited"] = edited.scores
        if prepared.never is not None:
            scores["never"] = _measure_never(prepared, prepared.never, base, events)
        measurements = summarize_all(scores)
        save_edit(base.edit, staging / FOLDER)
        results = write_results(staging, _about(prepared, base, export, leaks, edited.replies), measurements)
        card.write_card(staging, results, asdict_changes(export))
        write_manifest(
            staging, base=prepared.source.describe(), base_files=export.base_sha256, changes=export.changes,
            untied=export.untied, known=export.output_sha256, run=results["run"],
        )  # fmt: skip
        report.write_report(out / "report.html", results, asdict_changes(export))
    shutil.rmtree(work)
    return Finished(out, results)


@dataclass(frozen=True)
class EditedFindings:
    """What was measured on the edited checkpoint, re-opened from disk."""

    scores: list[Scores]
    replies: dict[str, list[Reply]]


def _study_base(prepared: Prepared, kept: Path, events: Events) -> BaseFindings:
    """Measure the base, learn candidates, choose one; the edit is kept for a resumed run."""
    with events.stage("load base"):
        loaded = load_model(prepared.source, prepared.device, prepared.dtype)
    subject = _subject(prepared, loaded)
    scores = _measure(subject, "measure base", prepared, events)
    if (kept / "edit.json").exists():
        edit = load_edit(kept)
        assert isinstance(edit, Edit), "the run itself saved it"
    else:
        edit = _learn(prepared, loaded, events)
        partial = kept.with_name("edit.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_edit(edit, partial)
        os.rename(partial, kept)
    scores.append(_induce(prepared, loaded, edit, events, "induce on base"))
    writes = measure_writes(loaded.model, prepared.row, edit.basis, _leak_inputs(prepared, loaded))
    replies = {split: subject.replies(split) for split in ("concept", "neutral")}
    reference = subject.reference()
    del loaded, subject.model
    gc.collect()
    return BaseFindings(edit, scores, replies, reference, writes)


def _learn(prepared: Prepared, loaded: LoadedModel, events: Events) -> Edit:
    settings, concept = prepared.settings, prepared.concept
    pairs = list(concept.contrast)
    random.Random(f"excise contrast {settings.seed}").shuffle(pairs)
    validation, training = pairs[: settings.validation_pairs], pairs[settings.validation_pairs :]
    training = training[: settings.train_pairs]
    chat = concept.about.kind == "behaviour"
    positive, negative = (
        [encode_prompt(loaded.tokenizer, text, chat=chat) for text in texts]
        for texts in ([pair.positive for pair in training], [pair.negative for pair in training])
    )
    positions = _positions(settings, [*positive, *negative], chat)
    points = tuple(range(len(prepared.strengths) + 1))
    with events.stage("learn directions", len(positive) + len(negative)) as stage:
        source = DIRECTION_SOURCES[settings.direction_source]
        last = len(positions)
        plus = _streams(prepared, loaded, positive, points, last, stage.advance)
        minus = _streams(prepared, loaded, negative, points, last, stage.advance)
        directions = source(plus, minus, points, positions)
    candidates, chosen, passed, probe = _choose(prepared, loaded, directions, validation, events)
    vector, negative_mean = stacked(directions, chosen.point, chosen.position)
    provenance = {
        "source": settings.direction_source, "point": chosen.point, "position": chosen.position,
        "norm": float(vector.norm()), "passed_filters": passed, "pairs": {"train": len(training), "validation": len(validation)},
        "probe": probe, "candidates": [asdict(candidate) for candidate in candidates],
        "base": prepared.source.describe(), "concept": {"ref": concept.ref, "sha256": concept.sha256}, "seed": settings.seed,
    }  # fmt: skip
    if settings.variant == "projected":
        vector = without_component(vector, negative_mean)
    return _edit(settings, prepared.checkpoint, prepared.strengths, unit(vector), provenance)


def _choose(
    prepared: Prepared, loaded: LoadedModel, directions: Directions, validation: Sequence[ContrastPair], events: Events
) -> tuple[list[Candidate], Candidate, bool, dict[str, Any]]:
    settings = prepared.settings
    with events.stage("read the base on validation items"):
        probe = _probe(prepared, loaded, validation)
    filters = Filters(settings.max_depth, settings.max_kl, settings.min_induce)
    with events.stage("score candidates", len(directions.points) * len(directions.positions)) as stage:
        candidates = score_candidates(
            loaded.model, prepared.row, directions, probe, filters, len(prepared.strengths), stage.advance
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


def _probe(prepared: Prepared, loaded: LoadedModel, validation: Sequence[ContrastPair]) -> Probe:
    if prepared.concept.about.kind == "behaviour":
        return BehaviourProbe(loaded.model, loaded.tokenizer, validation, prepared.settings.reply_tokens)
    # Group V is never shown to anything that learns or chooses an edit.
    questions = [q for q in prepared.concept.questions if q.split == "forget" and q.group == "T"]
    if not questions:
        raise RequestError(
            f"concept {prepared.concept.ref} has no forget questions of group T to choose a direction by"
        )
    return KnowledgeProbe(loaded.model, loaded.tokenizer, validation, questions[: prepared.settings.validation_pairs])


def _measure_edited(
    prepared: Prepared, base: BaseFindings, folder: Path, events: Events
) -> tuple[EditedFindings, list[Leak]]:
    with events.stage("load edited"):
        loaded = load_model(ModelSource("local", "the edited checkpoint", folder), prepared.device, prepared.dtype)
    after = measure_writes(loaded.model, prepared.row, base.edit.basis, _leak_inputs(prepared, loaded))
    embedding_strength = 0.0 if prepared.settings.embeddings == "skip" else 1.0
    leaks = compare_writes(base.writes, after, prepared.strengths, embedding_strength)
    check_leaks(leaks, prepared.settings.leak_tolerance)
    subject = _subject(prepared, loaded, base.reference)
    scores = _measure(subject, "measure edited", prepared, events)
    scores.append(_induce(prepared, loaded, base.edit, events, "induce on edited"))
    replies = {split: subject.replies(split) for split in ("concept", "neutral")}
    del loaded, subject.model
    gc.collect()
    return EditedFindings(scores, replies), leaks


def _measure_never(prepared: Prepared, source: ModelSource, base: BaseFindings, events: Events) -> list[Scores]:
    with events.stage("load never"):
        loaded = load_model(source, prepared.device, prepared.dtype)
    scores = _measure(_subject(prepared, loaded, base.reference), "measure never", prepared, events)
    del loaded
    gc.collect()
    return scores


def _measure(subject: Subject, name: str, prepared: Prepared, events: Events) -> list[Scores]:
    with events.stage(name, workload(prepared.concept, _eval_settings(prepared.settings))) as stage:
        subject.advance = stage.advance
        scores = measure(subject)
        stage.advance(0, **{f"{item.name}/{item.split}": item.value() for item in scores})
    return scores


def _induce(prepared: Prepared, loaded: LoadedModel, edit: Edit, events: Events, name: str) -> Scores:
    """Add the direction as long as it was learned, where it was learned, and count what it brings about."""
    vector = edit.basis[:, 0] * edit.provenance["norm"]
    subject = _subject(prepared, loaded)
    with events.stage(name, len(subject.prompts("neutral"))) as stage:
        subject.advance = stage.advance
        with added(loaded.model, prepared.row, vector, edit.provenance["point"]):
            return induced(subject)


def _subject(prepared: Prepared, loaded: LoadedModel, reference: Reference | None = None) -> Subject:
    settings = _eval_settings(prepared.settings)
    return Subject(loaded.model, loaded.tokenizer, prepared.concept, settings, reference)


def _eval_settings(settings: OrthogonalizeSettings) -> EvalSettings:
    return EvalSettings(settings.reply_tokens, settings.kl_prompts, settings.questions)


def _streams(
    prepared: Prepared, loaded: LoadedModel, rows: list[list[int]], points: tuple[int, ...], last: int, advance: Any
) -> Iterator[Tensor]:
    size = 16
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        yield residual_stream(loaded.model, prepared.row, _padded(loaded, batch), points, last)
        advance(len(batch))


def _leak_inputs(prepared: Prepared, loaded: LoadedModel) -> list[dict[str, Tensor]]:
    chat = prepared.concept.about.kind == "behaviour"
    texts = [text for pair in prepared.concept.contrast[:16] for text in (pair.positive, pair.negative)]
    return [_padded(loaded, [encode_prompt(loaded.tokenizer, text, chat=chat) for text in texts])]


def _padded(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    encoded = [list(row) for row in rows]
    padded = loaded.tokenizer.pad({"input_ids": encoded}, padding=True, padding_side="left", return_tensors="pt")
    return {key: padded[key].to(loaded.device) for key in ("input_ids", "attention_mask")}


def _positions(settings: OrthogonalizeSettings, rows: Sequence[Sequence[int]], chat: bool) -> tuple[int, ...]:
    """End-of-prompt positions: the tokens that all prompts end with (the template's), or a fixed number of them."""
    shared = 0
    while all(len(row) > shared and row[-1 - shared] == rows[0][-1 - shared] for row in rows):
        shared += 1
    wanted = settings.positions or (max(1, min(shared, 8)) if chat else PLAIN_TEXT_POSITIONS)
    shortest = min(map(len, rows))
    if wanted > shortest:
        raise RequestError(
            f"positions={wanted}, but the shortest prompt of contrast.jsonl has {shortest} tokens; ask for fewer"
        )
    return tuple(range(-wanted, 0))


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


def _builtin_never(settings: OrthogonalizeSettings, concept: Concept) -> ModelSource | None:
    if settings.model == "builtin:testbed" and concept.ref == "builtin:potions":
        return find_model("builtin:testbed-never")
    return None


def asdict_changes(export: Export) -> list[dict[str, Any]]:
    """What happened to each declared tensor, as plain data."""
    return [asdict(change) for change in export.changes]


def _about(
    prepared: Prepared, base: BaseFindings, export: Export, leaks: Sequence[Leak], edited: dict[str, list[Reply]]
) -> dict[str, Any]:
    """Everything in ``eval.json`` but the measurements; the same run on the same machine gives the same bytes."""
    settings, concept = prepared.settings, prepared.concept
    own = settings.model_dump(exclude={"model", "concept", "out", "device", "dtype", "never"})
    changed = {k: v for k, v in own.items() if v != type(settings).model_fields[k].default}
    dtype = str(prepared.dtype).removeprefix("torch.")
    return {
        "base": {**prepared.source.describe(), "computed_in": dtype},
        "edited": {
            "method": RECIPE, "variant": settings.variant, "embeddings": settings.embeddings, "tied": prepared.plan.tied,
            "layer_strengths": list(prepared.strengths),
            "tensors_declared": len(export.changes), "tensors_changed": sum(c.changed for c in export.changes),
            "bytes": export.bytes_written,
        },
        "never": None if prepared.never is None else prepared.never.describe(),
        "concept": {
            "ref": concept.ref, "name": concept.about.name, "kind": concept.about.kind,
            "description": concept.about.description, "license": concept.about.license, "source": concept.about.source,
            "sha256": concept.sha256, "decline_phrases": list(concept.about.decline_phrases),
        },
        "direction": {**base.edit.provenance},
        "leaks": [asdict(leak) for leak in leaks],
        "leak_tolerance": settings.leak_tolerance,
        "samples": samples(base.replies, edited, SAMPLES),
        "run": {
            "recipe": RECIPE, "seed": settings.seed, "settings": own, "device": prepared.device.type, "dtype": dtype,
            "command": _command(prepared, changed),
        },
    }  # fmt: skip


def _command(prepared: Prepared, changed: dict[str, Any]) -> str:
    source = prepared.source
    model = f"{source.name}@{source.revision}" if source.revision else source.name
    words = [
        "excise",
        "run",
        RECIPE,
        "--model",
        model,
        "--concept",
        prepared.concept.ref,
        "--seed",
        str(prepared.settings.seed),
    ]
    for key, value in changed.items():
        if key != "seed":
            words += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    return " ".join(words)
