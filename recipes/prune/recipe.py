"""Neuron pruning: silence the units that a concept needs and the rest does not, and measure equally many others."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...artifacts.checkpoints.heads import plan_edit
from ...artifacts.events import Events, Stage
from ...artifacts.models.load import LoadedModel
from ...editing.architectures import residual_width
from ...editing.edits.base import edit_model
from ...editing.edits.fake_quantization import linear_weights, restore
from ...editing.edits.pruned_units import PrunedUnits, Semantics
from ...editing.edits.unit_choice import Units, UnitScores, combine, in_both, matched_units, top_units
from ...editing.errors import RequestError
from ...editing.hooks.unit_scores import by_head
from ...editing.modules import language_config
from ...eval.inference import multiple_choice_set
from ...eval.items import for_training
from ..common import measured_run
from ..common.budgets import Budgets
from ..common.examples import Example
from ..common.measured_run import Finished, Inspection, Job, MeasuredSettings
from ..common.memory_plan import MemoryPlan, RunMemory, StageMemory, fit_step
from ..common.memory_sizes import Gradients, Rows, largest_of
from ..data.facts import Facts, find_facts
from ..data.unlearning_sets import forget_examples, retain_examples
from .scoring import BATCH, UnitScorer
from .story import story

__all__ = ["PruneSettings", "describe", "learn", "memory", "prepare", "run", "story"]

RECIPE = "prune"
TEXT_TOKENS = 256
"""Tokens of a text that are read at once."""


class PruneSettings(MeasuredSettings):
    """Settings of neuron and head pruning."""

    budgets: ClassVar[Budgets] = {
        "quick": {"examples": 100, "validate_units": 8},
        "long": {"examples": 2000, "validate_units": 96},
    }
    concept: str = "builtin:potions"
    """Concept pack to erase: builtin:NAME or a folder."""
    score: Literal["attribution", "mean_attribution", "mean_difference", "selectivity", "saliency"] = "attribution"
    """Score of a unit: activation times gradient (from 0 or its mean), d', ratio of sizes, or ranks."""
    share: float = Field(0.1, ge=0, lt=1)
    """Share of all MLP neurons to prune, from 0 to below 1. Higher values erase and damage more."""
    heads_share: float = Field(0.0, ge=0, lt=1)
    """Share of all attention heads to prune, from 0 to below 1. Higher values erase and damage more."""
    retain_weight: float = Field(1.0, ge=0)
    """Lambda in forget - lambda retain, each score as a share of its total. Higher values spare units that retain texts
    use."""
    semantics: Semantics = "down"
    """How to prune: zero outputs (down), inputs too (all), mark them (frozen), fold the mean into the bias, or
    delete."""
    examples: int = Field(400, ge=8)
    """Most forget sequences, and most retain sequences, that units are scored on. More give steadier scores."""
    controls: bool = True
    """Also measure pruning as many random units, matched in layer and size, and as many of the largest units."""
    validate_units: int = Field(24, ge=0)
    """Units that are removed one at a time, to report the rank correlation of scores and effects; 0 skips this
    check."""


@dataclass(frozen=True)
class PruneJob:
    """A checked request and the facts that its pack teaches."""

    run: Job
    settings: PruneSettings
    facts: Facts


def prepare(settings: PruneSettings, *, resume: bool = False) -> PruneJob:
    """Check names, files, memory and disk, before any weight is read.

    Raises:
        RequestError: Anything that could not work.
    """
    run = measured_run.check(RECIPE, settings, ["forget", "retain"], resume=resume)
    if settings.share == 0 and settings.heads_share == 0:
        raise RequestError("share=0 and heads_share=0 prune nothing; raise one of them")
    if settings.kl_budget is not None:
        raise RequestError(
            "kl_budget turns the strength of an edit, and pruned units are removed whole; leave out kl_budget and lower"
            " share instead"
        )
    if settings.heads_share and settings.semantics in ("mean", "remove"):
        reason = (
            "folds neurons into biases; heads have no bias of their own"
            if settings.semantics == "mean"
            else "cuts MLP neurons only"
        )
        raise RequestError(f"semantics={settings.semantics} {reason}, use heads_share=0")
    # Stand-ins for units that are not chosen yet; cutting neurons out needs as many of every layer.
    some: Units = dict.fromkeys(range(run.layers), (0,)) if settings.semantics == "remove" else {0: (0,)}
    job = PruneJob(run, settings, find_facts(run.concept))
    one = _edit(job, some if settings.share else {}, some if settings.heads_share else {})
    plan = plan_edit(replace(one, means={0: torch.zeros(1)}), run.checkpoint)
    measured_run.check_plan(run, plan)
    return job


def describe(job: PruneJob) -> dict[str, Any]:
    """What a run would touch and take."""
    run = job.run
    every: Units = dict.fromkeys(range(run.layers), (0,))
    edit = replace(_edit(job, every, {}), means=_means(job, every, torch.zeros(run.layers, 1)))
    plan = plan_edit(edit, run.checkpoint)
    return measured_run.describe(run, plan, gradient_steps=0)


def memory(job: PruneJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, sizes = RunMemory.of(job.run), RunMemory.of(job.run).sizes
    concept = job.run.concept
    texts = [*concept.texts(), *(q.prompt for q in concept.questions)]
    rows = Rows(min(BATCH, job.settings.examples), needs.longest(texts, TEXT_TOKENS))
    if needs.tokenizes():
        read = [some[:: max(1, len(some) // job.settings.examples)] for some in _examples(job, needs.tokenizer)]
        batches = [largest_of([len(one.ids) for one in some], BATCH) for some in read if some]
        rows = max(batches, key=lambda batch: batch.tokens, default=rows)
    # A layer's units are summed in float64: as they are, squared, and without their sign.
    beside = 2 * 8 * rows.tokens * sizes.widest() + sizes.head(job.run.device)
    room = needs.room - needs.weights - needs.baseline - beside
    step = fit_step(sizes, Gradients(), rows, room)
    score = StageMemory(f"score units{step.in_words()}", needs.weights, work=step.size + beside, kept=needs.baseline)
    asked = needs.asking("compare with controls")
    copies = sum(weight.numel() for weight in sizes.linear_weights()) * sizes.dtype.itemsize
    controls = replace(asked, weights=asked.weights + copies)
    return needs.measured_run([score, controls])


def run(job: PruneJob, events: Events) -> Finished:
    """Do the whole run: score, choose, prune, compare with controls, measure, publish."""
    out, settings = job.run.out, job.settings
    work = measured_run.start(job.run)
    events.path = out / "events.jsonl"
    loaded = measured_run.load(job.run, job.run.source, "base", events)
    measured = measured_run.measure_base(job.run, loaded, events)
    edit = measured_run.learned_edit(work, lambda: _learn(job, loaded, events))
    assert isinstance(edit, PrunedUnits)
    del loaded
    neurons, heads = (sum(map(len, units.values())) for units in (edit.neurons, edit.heads))
    about = {
        "edited": {
            "how": "pruned",
            "rank": None,
            "semantics": settings.semantics,
            "about": f"{neurons} neurons and {heads} heads silenced",
        },
        "pruning": edit.provenance["pruning"],
        "warnings": _warnings(edit.provenance["pruning"]),
    }
    finished = measured_run.publish(job.run, edit, measured, about, events, lambda _, __: Inspection())
    shutil.rmtree(work)
    return finished


def _warnings(pruning: dict[str, Any]) -> list[str]:
    shared = pruning.get("random_shares")
    return (
        [f"More than half of a layer is pruned, so that {shared} of the random control's units are pruned ones too."]
        if shared
        else []
    )


def learn(job: PruneJob, loaded: LoadedModel, events: Events, _: Path, __: dict[str, Any]) -> PrunedUnits:
    """The edit alone, for a search; the base is unchanged afterwards."""
    return _learn(job, loaded, events)


def _learn(job: PruneJob, loaded: LoadedModel, events: Events) -> PrunedUnits:
    """Score all units, choose some, and compare pruning them with pruning others."""
    settings, concept = job.settings, for_training(job.run.concept)
    forget, retain = _examples(job, loaded.tokenizer)
    scorer = UnitScorer(loaded, job.run.row, forget, retain, events)
    neurons, head_columns = scorer.scores(settings.score, settings.examples)
    combined, chosen = None, Units()
    if neurons is not None:
        combined = combine(neurons, settings.retain_weight)
        chosen = top_units(combined, settings.share, alike=settings.semantics == "remove")
    mean = None if neurons is None else neurons.mean
    width, chosen_heads = 1, Units()
    if head_columns is not None:
        width = _head_width(job, loaded)
        parts = (head_columns.forget, head_columns.retain, head_columns.size, head_columns.mean)
        heads = UnitScores(*(by_head(part, width) for part in parts))
        chosen_heads = top_units(combine(heads, settings.retain_weight), settings.heads_share)
    edit = _edit(job, chosen, chosen_heads, mean, width)
    alternatives, shared = {"chosen": edit}, 0
    if settings.controls and chosen and neurons is not None:
        others = _controls(settings, chosen, neurons)
        shared = in_both(chosen, others["random"])
        alternatives |= {name: _edit(job, units, {}, mean, width) for name, units in others.items()}
    with events.stage("compare with controls", len(alternatives)) as stage:
        compared = {name: _accuracies(job, loaded, one, stage) for name, one in alternatives.items()}
    validation = None
    if settings.validate_units and neurons is not None and combined is not None:
        validation = scorer.validate(neurons, combined, settings.validate_units)
    pruning = {
        "score": settings.score,
        "share": settings.share,
        "heads_share": settings.heads_share,
        "semantics": settings.semantics,
        "by_layer": [len(chosen.get(layer, ())) for layer in range(job.run.layers)],
        "controls": compared,
        "random_shares": shared,
        "validation": validation,
    }
    provenance = {
        "source": RECIPE,
        "base": job.run.source.describe(),
        "seed": settings.seed,
        "pruning": pruning,
        "concept": {"ref": concept.ref, "sha256": concept.sha256},
    }
    return replace(edit, provenance=provenance)


def _examples(job: PruneJob, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """What is to be forgotten and what must stay."""
    concept, seed = for_training(job.run.concept), job.settings.seed
    forget = forget_examples(concept, job.facts, tokenizer, seed, TEXT_TOKENS)
    return forget, retain_examples(concept, tokenizer, seed, TEXT_TOKENS)


def _controls(settings: PruneSettings, chosen: Units, neurons: UnitScores) -> dict[str, Units]:
    """As many other units: random ones, matched in layer and size, and the largest."""
    generator = torch.Generator().manual_seed(settings.seed)
    return {
        "random": matched_units(chosen, neurons.size, generator),
        "largest": top_units(neurons.size, settings.share, alike=settings.semantics == "remove"),
    }


def _accuracies(job: PruneJob, loaded: LoadedModel, edit: PrunedUnits, stage: Stage) -> dict[str, Any]:
    """Multiple choice of every split under an edit, in memory; the model is put back afterwards."""
    weights = linear_weights(loaded.model)
    weights_before = {name: weight.detach().clone() for name, weight in weights.items()}
    biases = {name: p for name, p in loaded.model.named_parameters() if name.endswith("bias")}
    biases_before = {name: p.detach().clone() for name, p in biases.items()}
    try:
        edit_model(edit, loaded.model, job.run.checkpoint.config)
        found = multiple_choice_set.accuracies(loaded.model, loaded.tokenizer, job.run.measured, job.settings.questions)
    finally:
        # Half of the edit may be applied when it fails, so weights and biases are put back in any case.
        restore(weights, weights_before)
        restore(biases, biases_before)
    stage.advance()
    return found


def _head_width(job: PruneJob, loaded: LoadedModel) -> int:
    """Columns of one attention head."""
    config = language_config(loaded.model)
    # In some models a head is not as wide as the stream divided by the number of heads.
    if width := getattr(config, "head_dim", None):
        return int(width)
    return residual_width(job.run.checkpoint.config) // int(config.num_attention_heads)


def _means(job: PruneJob, units: Units, mean: Tensor) -> dict[int, Tensor]:
    """What is folded into biases: the mean activation of each pruned neuron."""
    if job.settings.semantics != "mean":
        return {}
    return {layer: mean[layer, list(chosen)].float() for layer, chosen in units.items()}


def _edit(job: PruneJob, neurons: Units, heads: Units, mean: Tensor | None = None, head_width: int = 1) -> PrunedUnits:
    """The edit that prunes some units.

    Args:
        mean: Mean activation of every neuron [layers, units].
    """
    config = job.run.checkpoint.config
    return PrunedUnits(
        neurons,
        heads,
        job.settings.semantics,
        config["model_type"],
        residual_width(config),
        job.run.layers,
        head_width,
        {} if mean is None else _means(job, neurons, mean),
    )
