"""Take a direction out of a model's weights: find it, choose it, remove it, check it, measure it, export it."""

import gc
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts.checkpoints.edits import load_edit
from ..artifacts.events import Events
from ..artifacts.models.load import LoadedModel
from ..artifacts.reporting.results import format_value, read_measurements
from ..artifacts.reporting.sections import Section, Story, Table, heat_map
from ..editing.architectures import layer_selection, residual_width
from ..editing.directions.difference_in_means import unit, without_component
from ..editing.edits.base import Plan
from ..editing.edits.subspace_removal import Edit
from ..editing.errors import RequestError
from ..editing.hooks.leaks import Writes, check_leaks, compare_writes, measure_writes
from ..editing.hooks.residual_stream import added
from ..eval.inference.generation import encode_prompt
from ..eval.measurements.behaviour import induced
from ..eval.model_under_test import ModelUnderTest
from ..eval.statistics import Scores
from .common import measured_run
from .common.direction_search import Direction, DirectionSearch, DirectionSettings, check_pairs, padded
from .common.measured_run import Finished, Inspection, Job, Measured
from .common.run_folder import start_folder
from .common.story import tensors_changed

RECIPE = "orthogonalize"


class OrthogonalizeSettings(DirectionSettings):
    """Settings of weight orthogonalization (Arditi et al. 2024, unless another source is named)."""

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
    strengths = layer_strengths(settings, job.layers)
    config = job.checkpoint.config
    unlearned = _edit(settings, config["model_type"], strengths, torch.eye(residual_width(config), 1))
    plan = unlearned.plan(config, list(job.checkpoint.tensors))
    measured_run.check_plan(job, plan)
    check_pairs(job.concept, settings)
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
    settings = prepared.settings
    direction = DirectionSearch(loaded, prepared.job.concept, settings, events).run()
    return edit_along(direction, settings, prepared.job.checkpoint.config["model_type"], prepared.strengths)


def edit_along(
    direction: Direction, settings: OrthogonalizeSettings, model_type: str, strengths: tuple[float, ...]
) -> Edit:
    """The edit that takes a direction out of the weights of the model that it was learned on."""
    vector = direction.vector
    if settings.variant == "projected":
        vector = without_component(vector, direction.negative_mean)
    return _edit(settings, model_type, strengths, unit(vector), direction.provenance)


def _induce(prepared: OrthogonalizeJob, loaded: LoadedModel, edit: Edit, events: Events, name: str) -> Scores:
    """Add the direction as long as it was learned, where it was learned, and count what it brings about."""
    vector = edit.basis[:, 0] * edit.provenance["norm"]
    subject = measured_run.subject_of(prepared.job, loaded)
    with events.stage(name, len(subject.prompts("neutral"))) as stage:
        subject.advance = stage.advance
        with added(loaded.model, prepared.job.row, vector, edit.provenance["point"]):
            return induced(subject)


def _leak_inputs(prepared: OrthogonalizeJob, loaded: LoadedModel) -> list[dict[str, Tensor]]:
    chat = prepared.job.concept.about.kind == "behaviour"
    texts = [text for pair in prepared.job.concept.contrast[:16] for text in (pair.positive, pair.negative)]
    return [padded(loaded, [encode_prompt(loaded.tokenizer, text, chat=chat) for text in texts])]


def layer_strengths(settings: OrthogonalizeSettings, count: int) -> tuple[float, ...]:
    """One strength for each layer of the model; 0 where the layer is not selected."""
    chosen = set(layer_selection(settings.layers, count))
    given = settings.strength if isinstance(settings.strength, tuple) else (settings.strength,) * count
    if len(given) != count:
        raise RequestError(
            f"strength lists {len(given)} numbers, the model has {count} layers; give one number or {count}"
        )
    return tuple(value if layer in chosen else 0.0 for layer, value in enumerate(given))


def _edit(
    settings: OrthogonalizeSettings,
    model_type: str,
    strengths: tuple[float, ...],
    basis: Tensor,
    provenance: dict[str, Any] | None = None,
) -> Edit:
    return Edit(basis, model_type, strengths, settings.embeddings, settings.variant, provenance or {})


def story(results: dict[str, Any]) -> Story:
    """What orthogonalization says of its runs, from everything else that ``eval.json`` holds."""
    direction, edited = results["direction"], results["edited"]
    headline = (
        f"**What was edited.** One direction for *{results['concept']['description']}* was taken out of the weights of "
        f"`{results['base']['name']}` ({tensors_changed(results)}, of those that write to the residual stream; variant "
        f"`{edited['variant']}`, embeddings `{edited['embeddings']}`)."
    )
    warnings = []
    if not direction["passed_filters"]:
        warnings.append(
            "No candidate direction passed the filters; the one that moves neutral text least was used. Expect little "
            "effect, or damage."
        )
    if edited["tied"] and edited["embeddings"] == "edit":
        warnings.append("The embedding is also the unembedding of this model, so both were edited.")
    limit = (
        "One direction was removed from what the weights write. Whatever the model encodes in other directions, or can "
        "relearn by fine-tuning, is still there."
    )
    return Story(
        headline,
        findings=tuple(
            f"With the direction added, neutral replies of the base show the concept: {format_value(item)}, n = {item.n}."
            for item in read_measurements(results)
            if (item.name, item.subject) == ("induced_rate", "base")
        ),
        warnings=tuple(warnings),
        limits=(limit,),
        sections=(_origin(results), _candidates(direction), _leak_section(results)),
    )


def _origin(results: dict[str, Any]) -> Section:
    direction = results["direction"]
    worst = max((leak["share"] for leak in results["leaks"] if leak["expected"] == 0), default=0.0)
    about = (
        f"{direction['source'].replace('_', ' ').capitalize()} of {direction['pairs']['train']} contrast pairs of concept "
        f"`{results['concept']['ref']}`, at the input of layer {direction['point']}, position {direction['position']} of the "
        f"prompt; chosen among {len(direction['candidates'])} candidates on {direction['pairs']['validation']} other pairs. All "
        "scores are in `excise/edit.json`."
    )
    check = (
        f"Leak check: at most {worst:.2e} of the component is left in what any edited sublayer writes on real inputs."
    )
    return Section("Where the direction comes from", (about, check))


MAPS = {
    "bypass": ("Bypass", "How strongly the concept shows on its own items while the direction is ablated; lower is better.", False),
    "induce": ("Induce", "How strongly it shows on neutral items while the direction is added; higher is better.", True),
    "kl": ("KL", "How far ablation moves neutral text; lower is better.", False),
}  # fmt: skip
"""Scores of candidates: title, what it says, whether higher is better."""


def _candidates(direction: dict[str, Any]) -> Section:
    by_place = {(one["point"], one["position"]): one for one in direction["candidates"]}
    points, positions = (sorted({place[axis] for place in by_place}) for axis in (0, 1))
    grid = [[by_place[point, position] for position in positions] for point in points]
    figures = []
    for key, (title, about, higher_is_better) in MAPS.items():
        units = "nats a token" if key == "kl" else direction["probe"]["units"]
        figures.append(
            heat_map(
                f"{title} ({units})",
                about,
                ["layer", *map(str, points)],
                [str(position) for position in positions],
                [[one[key] for one in row] for row in grid],
                [[one["rejected"] or "passes the filters" for one in row] for row in grid],
                (points.index(direction["point"]), positions.index(direction["position"])),
                higher_is_better=higher_is_better,
            )
        )
    about = (
        "Each cell is one candidate: a point of the residual stream (the input of that layer) and a position counted from "
        "the end of the prompt. The outlined one was used. “–” was rejected before scoring; the reason shows on hover and in "
        "`excise/edit.json`."
    )
    failed = "" if direction["passed_filters"] else " **No candidate passed the filters.**"
    return Section("How the direction was chosen", (about + failed,), figures=tuple(figures), where=("report",))


def _leak_section(results: dict[str, Any]) -> Section:
    about = (
        "What each sublayer still writes along the removed direction, on real inputs, as a share of what it wrote before. "
        f"More than {results['leak_tolerance']} above the expected share stops the run."
    )
    rows = tuple(
        (
            "–" if leak["layer"] is None else str(leak["layer"]),
            leak["sublayer"],
            f"{leak['share']:.2e}",
            f"{leak['of_write']:.2e}",
            str(leak["expected"]),
        )
        for leak in results["leaks"]
    )
    headers = ("layer", "sublayer", "left, share of before", "left, share of the write", "expected")
    return Section("Leak check", (about,), (Table(headers, rows),), where=("report",))
