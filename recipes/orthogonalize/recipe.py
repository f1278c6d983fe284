"""Take a direction out of a model's weights: find it, choose it, remove it, check it, measure it, export it."""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...artifacts.checkpoints.heads import plan_edit
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...editing.architectures import layer_selection, residual_width
from ...editing.directions.difference_in_means import stacked, unit, without_component
from ...editing.edits.base import Plan
from ...editing.edits.subspace_removal import Edit
from ...editing.errors import ExciseError, RequestError
from ...editing.hooks.leaks import Writes, check_leaks, compare_writes, measure_writes
from ...editing.hooks.residual_stream import added
from ...eval.inference.chat import encode_prompt
from ...eval.inference.likelihood import pad_left
from ...eval.measurements.behaviour import induced
from ...eval.model_under_test import ModelUnderTest
from ...eval.statistics import Scores
from ..common import measured_run
from ..common.base_figures import Measured
from ..common.direction_search import (
    PROMPTS_AT_ONCE,
    Direction,
    DirectionSearch,
    DirectionSettings,
    check_pairs,
    why_none_passed,
)
from ..common.measured_run import Finished, Inspection, Job
from ..common.memory_plan import MemoryPlan, RunMemory
from ..common.memory_sizes import Rows
from .story import story

__all__ = ["OrthogonalizeSettings", "describe", "learn", "memory", "prepare", "run", "story"]

RECIPE = "orthogonalize"
LEAK_PAIRS = 16
"""Contrast pairs on which it is checked that nothing is left of the direction."""


class OrthogonalizeSettings(DirectionSettings):
    """Settings of weight orthogonalization (Arditi et al. 2024, unless another source is named)."""

    layers: Annotated[str, Field(coerce_numbers_to_str=True)] = "all"
    """Layers to edit: all, a number, a range such as 4-7, or fractions of the depth such as 0.25-0.75."""
    strength: float | tuple[float, ...] = 1.0
    """Share of the component along the direction to remove: one number, or a list with one for each layer. 0 none, 1
    all."""
    embeddings: Literal["edit", "skip", "untie"] = "edit"
    """edit changes the embedding and a tied unembedding; skip neither; untie edits the embedding and gives the
    unembedding its own tensor."""
    embedding_strength: float | None = None
    """Share to remove from the embeddings, which layer 0 reads. Without it: the strength of layer 0, and 0 where layers
    leaves layer 0 out."""
    mlp_strength: float | tuple[float, ...] | None = None
    """Share to remove from what MLPs write: one number, or a list with one for each layer. Without it: strength, which
    then holds for attention and MLPs alike."""
    variant: Literal["plain", "norm_preserving", "projected"] = "plain"
    """norm_preserving keeps every column's norm; projected first removes the negative prompts' mean from the
    direction."""
    per_layer: bool = False
    """Take out of each layer the direction at its own output, in place of one direction for all (heretic, Weidmann 2025).
    The embeddings lose the direction of the place that was chosen."""
    use_rejected_direction: bool = False
    """Go on when every candidate direction fails the filters, with the one that moves neutral text least. Expect little
    effect, or damage."""
    leak_tolerance: float = Field(0.05, ge=0)
    """Largest share of the direction that a sublayer may still write after the edit; more stops the run."""


@dataclass(frozen=True)
class Strengths:
    """What each layer loses of the direction."""

    layers: tuple[float, ...]
    """One for each layer of the model; 0 where the layer is not selected."""
    mlps: tuple[float, ...] | None = None
    """The same of what MLPs write; None where that of the layers holds."""

    @classmethod
    def of(cls, settings: OrthogonalizeSettings, count: int) -> "Strengths":
        """Those of a model of so many layers.

        Raises:
            RequestError: A list has another length.
        """
        chosen, mlp = set(layer_selection(settings.layers, count)), settings.mlp_strength
        mlps = None if mlp is None else _of_layers("mlp_strength", mlp, count, chosen)
        return cls(_of_layers("strength", settings.strength, count, chosen), mlps)


@dataclass(frozen=True)
class OrthogonalizeJob:
    """A checked request and what it will change."""

    run: Job
    settings: OrthogonalizeSettings
    plan: Plan
    strengths: Strengths


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
    checked = measured_run.check(RECIPE, settings, ["contrast"], resume=resume)
    strengths = Strengths.of(settings, checked.layers)
    config = checked.checkpoint.config
    # Any unit vector: which tensors change does not depend on the direction.
    unlearned = _edit(settings, config["model_type"], strengths, torch.eye(residual_width(config), 1))
    plan = plan_edit(unlearned, checked.checkpoint)
    measured_run.check_plan(checked, plan)
    check_pairs(checked.concept, settings)
    return OrthogonalizeJob(checked, settings, plan, strengths)


def describe(job: OrthogonalizeJob) -> dict[str, Any]:
    """What a run would touch and take."""
    points = int(job.settings.max_depth * job.run.layers)
    return measured_run.describe(job.run, job.plan, candidate_points=points, gradient_steps=0)


def memory(job: OrthogonalizeJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs = RunMemory.of(job.run)
    pairs = [text for pair in job.run.concept.contrast for text in (pair.positive, pair.negative)]
    longest = needs.longest(pairs, needs.context)
    learn = needs.reading("learn directions", Rows(PROMPTS_AT_ONCE, longest), points=job.run.layers + 1)
    leaks = needs.reading("look for leaks", Rows(2 * LEAK_PAIRS, longest))
    return needs.measured_run([learn, leaks])


def run(job: OrthogonalizeJob, events: Events) -> Finished:
    """Do the whole run. The run's folder gets ``checkpoint/``, ``report.html`` and ``events.jsonl``."""
    checked, settings = job.run, job.settings
    work = measured_run.start(checked)
    events.path = checked.out / "events.jsonl"
    base = _study_base(job, work, events)

    def inspect(loaded: LoadedModel, subject: ModelUnderTest) -> Inspection:
        after = measure_writes(loaded.model, checked.row, base.edit.basis_at, _leak_inputs(job, loaded))
        leaks = compare_writes(base.writes, after, checked.row, base.edit.strength_at)
        check_leaks(leaks, settings.leak_tolerance)
        scores = [_induce(job, loaded, base.edit, events, "induce on edited")]
        return Inspection(scores, {"leaks": [asdict(leak) for leak in leaks]})

    about = {
        "edited": {
            "how": "orthogonalized",
            "variant": settings.variant,
            "embeddings": settings.embeddings,
            "layer_strengths": list(base.edit.layer_strengths),
            "embedding_strength": base.edit.strength_at(None),
            **({"per_layer": True} if settings.per_layer else {}),
            **({} if base.edit.mlp_strengths is None else {"mlp_strengths": list(base.edit.mlp_strengths)}),
        },
        "direction": {**base.edit.provenance},
        "leak_tolerance": settings.leak_tolerance,
    }
    finished = measured_run.publish(checked, base.edit, base.measured, about, events, inspect)
    shutil.rmtree(work)
    return finished


def _study_base(job: OrthogonalizeJob, work: Path, events: Events) -> StudiedBase:
    """Measure the base, learn candidates, choose one; the edit is kept for a resumed run."""
    checked = job.run
    loaded = measured_run.load(checked, checked.source, "base", events)
    measured = measured_run.measure_base(checked, loaded, events)
    edit = measured_run.learned_edit(
        work, lambda: measured_run.within_budget(checked, _learn(job, loaded, events), loaded, events)
    )
    assert isinstance(edit, Edit), "the run itself saved it"
    measured.scores.append(_induce(job, loaded, edit, events, "induce on base"))
    writes = measure_writes(loaded.model, checked.row, edit.basis_at, _leak_inputs(job, loaded))
    del loaded
    return StudiedBase(edit, measured, writes)


def _learn(job: OrthogonalizeJob, loaded: LoadedModel, events: Events) -> Edit:
    settings = job.settings
    direction = DirectionSearch(loaded, job.run.concept, settings, events).run()
    # Whoever names a place has chosen the direction.
    if not direction.passed_filters and settings.point is None and not settings.use_rejected_direction:
        raise ExciseError(why_none_passed(direction.candidates, settings))
    return edit_along(direction, settings, job.run.checkpoint.config["model_type"], job.strengths)


def learn(job: OrthogonalizeJob, loaded: LoadedModel, events: Events, _: Path, shared: dict[str, Any]) -> Edit:
    """The edit alone, for a search; trials that name a place share the directions that were learned once.

    Args:
        shared: What trials have in common; their settings may differ in place and strength alone.
    """
    settings = job.settings
    if settings.point is None:
        return _learn(job, loaded, events)
    search = DirectionSearch(loaded, job.run.concept, settings, events)
    if "directions" not in shared:
        shared["directions"] = search.learn()
    direction = search.at(shared["directions"], settings.point, -1 if settings.position is None else settings.position)
    return edit_along(direction, settings, job.run.checkpoint.config["model_type"], job.strengths)


def edit_along(direction: Direction, settings: OrthogonalizeSettings, model_type: str, strengths: Strengths) -> Edit:
    """The edit that takes a direction out of the weights of the model that it was learned on."""
    basis, provenance = _removed(direction.vector, direction.negative_mean, settings), direction.provenance
    if not settings.per_layer:
        return _edit(settings, model_type, strengths, basis, provenance)
    learned, position = direction.learned, direction.position
    if learned is None:
        raise RequestError("per_layer=true needs a direction of every layer; give the result of find_direction")
    # What a layer adds is first in the stream at the input of the next.
    own = [stacked(learned, layer + 1, position) for layer in range(len(strengths.layers))]
    if alike := [layer for layer, (vector, _) in enumerate(own) if not vector.any()]:
        raise ExciseError(
            f"the model treats both sides of the contrast pairs alike at the output of layer {alike[0]}, so there is no"
            " direction to remove from it; use per_layer=false, or another position"
        )
    bases = [_removed(*pair, settings) for pair in own]
    edit = _edit(settings, model_type, strengths, basis, {**provenance, "per_layer": True})
    return replace(edit, layer_bases=torch.stack(bases))


def _removed(vector: Tensor, negative_mean: Tensor, settings: OrthogonalizeSettings) -> Tensor:
    """What is taken out [d, 1]."""
    return unit(without_component(vector, negative_mean) if settings.variant == "projected" else vector)


def _induce(job: OrthogonalizeJob, loaded: LoadedModel, edit: Edit, events: Events, name: str) -> Scores:
    """Add the direction as long as it was learned, where it was learned, and count what it brings about."""
    vector = edit.basis[:, 0] * edit.provenance["norm"]
    subject = measured_run.subject_of(job.run, loaded)
    with events.stage(name, len(subject.prompts("neutral"))) as stage:
        subject.advance = stage.advance
        with added(loaded.model, job.run.row, vector, edit.provenance["point"]):
            return induced(subject)


def _leak_inputs(job: OrthogonalizeJob, loaded: LoadedModel) -> list[dict[str, Tensor]]:
    chat = job.run.concept.about.kind == "behaviour"
    texts = [text for pair in job.run.concept.contrast[:LEAK_PAIRS] for text in (pair.positive, pair.negative)]
    return [pad_left([encode_prompt(loaded.tokenizer, text, chat=chat) for text in texts], loaded.device)]


def _of_layers(name: str, value: float | tuple[float, ...], count: int, chosen: set[int]) -> tuple[float, ...]:
    strengths = value if isinstance(value, tuple) else (value,) * count
    if len(strengths) != count:
        raise RequestError(
            f"{name} lists {len(strengths)} numbers, the model has {count} layers; give one number or {count}"
        )
    return tuple(one if layer in chosen else 0.0 for layer, one in enumerate(strengths))


def _edit(
    settings: OrthogonalizeSettings,
    model_type: str,
    strengths: Strengths,
    basis: Tensor,
    provenance: dict[str, Any] | None = None,
) -> Edit:
    return Edit(
        basis,
        model_type,
        strengths.layers,
        settings.embeddings,
        settings.embedding_strength,
        settings.variant,
        provenance or {},
        strengths.mlps,
    )
