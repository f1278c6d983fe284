"""Fine-tune with concepts ablated (CAFT), so that what they carry is not what is learned.

Casademunt et al. 2025: directions are projected out of the stream while training, and only then; the checkpoint is a
plain fine-tune, measured as it is used, without any ablation.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.directions import FILE, load_directions, save_directions
from ...artifacts.checkpoints.sae import load_latents
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...editing.architectures import layer_selection, residual_width
from ...editing.directions.sae_latents import SparseLatents
from ...editing.directions.subspaces import Place, Subspace, random_directions
from ...editing.edits.base import WeightEdit
from ...editing.errors import ConceptError, RequestError, counted
from ...editing.modules import language_config
from ..common import adapter_job, adapter_run
from ..common.adapter_run import Training
from ..common.examples import Example, chunked, cycled
from ..common.measured_run import Finished, Job
from ..common.memory_plan import MemoryPlan, RunMemory
from ..common.memory_sizes import Rows, largest_of
from ..common.packed_training import planned_rows
from ..common.tokens import Row
from ..common.trainer import Terms
from ..data.datasets import TuningData, encoded, find_data
from .controls import READ_ROWS, AblatedFineTuning, ControlRuns, DriftMonitor, directions_of, picked, some_pairs
from .direction_sources import BATCH as READ_AT_ONCE
from .direction_sources import PAIRS_LEFT_OUT, mean_projection, refreshed
from .request import CaftJob, CaftSettings
from .sae_latent_scores import by_attribution, by_contrast, ranked
from .story import story

__all__ = ["CaftSettings", "describe", "learn", "memory", "prepare", "run", "story", "trains_whole_weights"]

RECIPE = "caft"
LONGEST_ROW = 1024
"""Tokens of a row that is learned, at most."""


def prepare(settings: CaftSettings, *, resume: bool = False) -> CaftJob:
    """Check names, files, data, directions, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    if settings.tune == "full" and "learning_rate" not in settings.model_fields_set:
        # Fine-tuning of whole weights commonly takes a tenth of an adapter's learning rate.
        settings = settings.model_copy(update={"learning_rate": settings.learning_rate / 10})
    checked = adapter_job.prepare(RECIPE, settings, resume=resume, needed=(), whole=settings.tune == "full")
    job = checked.run
    concept = job.concept
    if concept.about.kind != "task":
        raise ConceptError(
            f"concept {concept.ref} is of kind {concept.about.kind}; caft fine-tunes on a pack of kind task, such as"
            " builtin:shortcut"
        )
    data = (
        find_data(settings.data, settings.data_map)
        if settings.data
        else TuningData(concept.train, concept.ref, concept.sha256.get("train.jsonl"))
    )
    if not data.rows:
        raise ConceptError(f"concept {concept.ref} has no train.jsonl and no data was given; add --set data=FILE.jsonl")
    directions, latents = _directions_or_latents(settings, job)
    layer_places = tuple(
        Place(layer, settings.site) for layer in sorted(layer_selection(settings.ablated_layers, job.layers))
    )
    # Given directions say themselves where they belong.
    places = (
        (latents.place,) if latents else tuple(dict.fromkeys(subspace.place for subspace in directions)) or layer_places
    )
    return CaftJob(checked, settings, data, places, directions, latents)


def _directions_or_latents(settings: CaftSettings, job: Job) -> tuple[tuple[Subspace, ...], SparseLatents | None]:
    """Directions of a file or latents of an autoencoder, and whether what is asked of the other sources can be had."""
    width = residual_width(job.checkpoint.config)
    directions: tuple[Subspace, ...] = ()
    latents = None
    if settings.directions_file is not None:
        directions = load_directions(settings.directions_file, width=width, layers=job.layers)
    elif settings.directions == "sae":
        latents = _latents(settings, job, width)
    elif settings.directions not in ("finetuned", "none"):
        job.concept.require(f"directions={settings.directions}", "contrast")
    if settings.remove == "latents" and not latents:
        raise RequestError(
            "remove=latents takes out an autoencoder's latents; add --set directions=sae --set sae=FOLDER"
        )
    if settings.components > width:
        raise RequestError(f"components={settings.components} are more than the model's width {width}; ask for fewer")
    if directions:
        # Said now, not after the controls.
        _ = picked(directions, settings.pick)
    elif settings.pick and max(settings.pick) >= (count := len(settings.latents) or settings.components):
        raise RequestError(
            f"pick={list(settings.pick)} names direction {max(settings.pick)}, there are 0 to {count - 1}; raise"
            " components"
        )
    return directions, latents


def _latents(settings: CaftSettings, job: Job, width: int) -> SparseLatents:
    if settings.sae is None:
        raise RequestError(
            "directions=sae needs an autoencoder; add --set sae=FOLDER, and latents=[3,17] or components=N"
        )
    if not settings.latents and settings.score == "contrast":
        job.concept.require("score=contrast", "contrast")
    latents = load_latents(settings.sae, settings.latents or None, width, job.layers)
    if settings.latents:
        # Latents that are not independent have no span of their number: said now, not after the controls.
        _ = latents.subspace
    if settings.remove == "latents" and settings.value == "mean":
        raise RequestError(
            "latents that are taken out as far as they fire leave no mean behind; use value=zero, or remove=span"
        )
    if settings.remove == "latents" and latents.not_alone:
        raise RequestError(
            f"the autoencoder {latents.not_alone}, so that some latents alone do not say how far they fire; use"
            " remove=span"
        )
    return latents


def describe(prepared: CaftJob) -> dict[str, Any]:
    """What a run would touch and take."""
    settings = prepared.settings
    controls = int(settings.directions == "finetuned")
    if settings.controls and settings.directions != "none":
        controls = 2 + _others_were_picked(settings)
    return adapter_job.describe(
        prepared.adapter,
        rows_to_learn=len(prepared.data.rows),
        trainings=1 + controls,
        ablated_at=[str(p) for p in prepared.places],
    )


def trains_whole_weights(prepared: CaftJob) -> bool:
    """Whether several processes can share the training."""
    return prepared.adapter.whole


def memory(prepared: CaftJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, settings = RunMemory.of(prepared.adapter.run), prepared.settings
    told = [row.text or f"{row.prompt}{row.completion}" for row in prepared.data.rows if not row.messages]
    told += [" ".join(message.content for message in row.messages) for row in prepared.data.rows if row.messages]
    limit = min(needs.context, LONGEST_ROW)
    longest = needs.longest(told, limit)
    read, scored = Rows(READ_AT_ONCE, longest), READ_ROWS * longest
    step = Rows(settings.batch_size, longest)
    if needs.tokenizes(told) and (examples := encoded(prepared.data.rows, needs.tokenizer, limit).examples):
        watched = examples[:READ_ROWS]
        read, scored = largest_of([len(one.ids) for one in watched], READ_AT_ONCE), sum(map(_scored, watched))
        lengths = [len(one.ids) for one in _order(examples, settings)]
        step = planned_rows(prepared.adapter, list(chunked(lengths, settings.batch_size)))
    # The stream is kept in fp32, of the model as it is and as it was.
    kept = 2 * 4 * scored * needs.sizes.width * len(prepared.places)
    if settings.directions not in ("none", "finetuned", "sae") and not prepared.directions:
        sides = [text for pair in prepared.adapter.run.concept.contrast for text in (pair.positive, pair.negative)]
        pairs = Rows(2 * READ_AT_ONCE, needs.longest(sides, needs.context))
        read = max(read, pairs, key=lambda rows: rows.tokens)
    # What is read is in fp32.
    points = len(prepared.places) * 4 // needs.sizes.dtype.itemsize
    find = needs.reading("find directions", read, points=points, kept=kept)
    train = needs.training(prepared.adapter, step, kept=kept)
    return needs.measured_run([find, train], edit=needs.edit_of(prepared.adapter))


def _scored(example: Example) -> int:
    return len(example.ids) - example.start


def _order(examples: Sequence[Example], settings: CaftSettings) -> list[Example]:
    """Drawn once, so that the run and its controls learn the same rows in the same order."""
    count = settings.steps * settings.batch_size
    return cycled(examples, count, random.Random(f"excise tuning {settings.seed}"))


def run(prepared: CaftJob, events: Events) -> Finished:
    """Do the whole run: find directions, train controls, train ablated, merge, measure, publish."""
    how = "fine-tuned" if prepared.settings.directions == "none" else "fine-tuned with concepts ablated"
    return adapter_run.run(prepared.adapter, how, partial(_training, prepared), events)


def learn(prepared: CaftJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return adapter_run.learn(prepared.adapter, loaded, partial(_training, prepared), work, events)


def _training(prepared: CaftJob, loaded: LoadedModel, events: Events, work: Path) -> "CaftTraining":
    settings = prepared.settings
    limit = min(int(getattr(language_config(loaded.model), "max_position_embeddings", LONGEST_ROW)), LONGEST_ROW)
    learn = encoded(prepared.data.rows, loaded.tokenizer, limit)
    if not learn.examples:
        raise ConceptError(f"no row of {prepared.data.name} fits into {limit} tokens; give shorter ones")
    order = _order(learn.examples, settings)
    trial = ControlRuns(prepared, loaded, learn.examples[:READ_ROWS], order, events, work)
    # What the unablated fine-tune changes is a source of directions, and the first control.
    wants_plain = settings.controls or settings.directions == "finetuned"
    plain = trial.control("none", ()) if wants_plain and settings.directions != "none" else None
    with events.stage("find directions"):
        latents = _chosen(prepared, loaded, learn.examples)
        candidates = directions_of(prepared, loaded, trial.base, plain.readings if plain else None, latents)
    subspaces = picked(candidates, settings.pick)
    as_they_fire = picked([latents], settings.pick) if latents and settings.remove == "latents" else ()
    controls = {"none": plain.scores} if plain and settings.controls else {}
    if settings.controls and subspaces:
        # A seed for each place, so that places do not share their random directions.
        drawn = [random_directions(subspace, settings.seed + 1 + place) for place, subspace in enumerate(subspaces)]
        elsewhere = [one.with_random_writes(settings.seed + 1) for one in as_they_fire]
        controls["random"] = trial.control("random", elsewhere or drawn).scores
    if settings.controls and subspaces and _others_were_picked(settings):
        first = range(len(settings.pick))
        highest = picked([latents], first) if latents and as_they_fire else picked(candidates, first)
        controls["top_k"] = trial.control("top_k", highest).scores
    if subspaces:
        save_directions(subspaces, work / FILE)

    objective = trial.objective(as_they_fire or subspaces)
    watch = DriftMonitor(trial, subspaces, work / "watched.json", objective)

    about = {
        "source": settings.directions_file.name if settings.directions_file else settings.directions,
        "mode": settings.mode,
        "value": settings.value,
        "remove": settings.remove,
        "directions": [
            {"place": str(s.place), "source": s.source, "names": list(s.names), "scores": list(s.scores)}
            for s in subspaces
        ],
        "controls": controls,
    }
    training = {
        "about": "Concept-ablated fine-tuning." if subspaces else "Plain fine-tuning.",
        "steps": settings.steps,
        "rows": settings.batch_size,
        "data": f"{len(learn.examples)} sequences from {len(prepared.data.rows)} rows of `{prepared.data.name}`",
        "data_sha256": prepared.data.sha256,
        "lessons": {"train": len(learn.examples)},
    }
    warnings = [*prepared.adapter.warnings, *prepared.data.notes]
    if learn.too_long:
        warnings.append(f"{counted(learn.too_long, 'row is', 'rows are')} longer than {limit} tokens and left out.")
    if left_out := max((s.provenance.get(PAIRS_LEFT_OUT, 0) for s in subspaces), default=0):
        warnings.append(
            f"Left out: {counted(left_out, 'contrast pair', 'contrast pairs')} of members that differ in length, or not at"
            f" all; compared: {subspaces[0].provenance['pairs']}."
        )
    checked_rows = [example.ids for example in learn.examples[:16]]
    report = {"training": training, "warnings": warnings, "caft": about}
    return CaftTraining(checked_rows, trial, objective, watch, report)


@dataclass
class CaftTraining(Training):
    """The fine-tune that is published, and what is seen of it."""

    checked_rows: Sequence[Row]
    trial: ControlRuns
    ablated: AblatedFineTuning
    monitor: DriftMonitor
    sections: dict[str, Any]

    def __post_init__(self) -> None:
        self.rows, prepared = self.ablated.rows, self.trial.prepared
        lengths = [len(example.ids) for example in self.rows]
        self.step_rows = planned_rows(prepared.adapter, list(chunked(lengths, prepared.settings.batch_size)))

    def objective(self) -> AblatedFineTuning:
        """Completions, while directions are ablated."""
        return self.ablated

    def collate(self, rows: list[Example]) -> dict[str, Any]:
        """The objective's."""
        return self.ablated.collate(rows)

    def loss(self, model: Any, batch: dict[str, Any]) -> Terms:
        """The objective's."""
        return self.ablated.loss(model, batch)

    def after_step(self, step: int) -> None:
        """Look at where the stream goes."""
        self.monitor(step)

    def looks(self, step: int) -> bool:
        """Whether the stream is looked at after this step."""
        return self.monitor.looks(step)

    def report(self, model: Any) -> dict[str, Any]:
        """What was ablated, and what of it came in all the same."""
        edited, base, subspaces = self.trial.read(), self.trial.base, self.monitor.subspaces
        projection = {"base": mean_projection(base, subspaces), "edited": mean_projection(edited, subspaces)}
        seen = {"share_in_span": refreshed(edited, base, subspaces), "during": self.monitor.seen()}
        return {**self.sections, "caft": {**self.sections["caft"], "projection": projection, **seen}}


def _chosen(prepared: CaftJob, loaded: LoadedModel, examples: Sequence[Example]) -> SparseLatents | None:
    """The latents to pick from: those that were named, or the first by score."""
    settings, latents, row = prepared.settings, prepared.latents, prepared.adapter.run.row
    if latents is None:
        return None
    if not settings.latents and settings.score == "contrast":
        latents = ranked(latents, by_contrast(loaded, row, latents, some_pairs(prepared)), settings.components)
    elif not settings.latents:
        latents = ranked(latents, by_attribution(loaded, row, latents, examples[:READ_ROWS]), settings.components)
    return latents


def _others_were_picked(settings: CaftSettings) -> bool:
    """Whether others were picked than the same number of the highest score; latents that were named have no order of
    score."""
    return not settings.latents and set(settings.pick) != set(range(len(settings.pick)))
