"""Neuron pruning: silence the units that a concept needs and the rest does not, and show what equally many others do."""

import gc
import shutil
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..artifacts.events import Events, Stage
from ..artifacts.models.load import LoadedModel
from ..artifacts.reporting.sections import Control, Section, Story, bars
from ..editing.architectures import Architecture, residual_width
from ..editing.edits.base import edit_model
from ..editing.edits.pruned_units import PrunedUnits, Semantics
from ..editing.errors import RequestError
from ..editing.hooks.unit_scores import (
    UnitAttribution,
    UnitMoments,
    by_head,
    gradients_reach_units,
    mean_difference,
    rank_correlation,
    rank_saliency,
    selectivity,
    unit_inputs,
)
from ..editing.numerics.fake_quantization import linear_weights, restore
from ..eval.inference.multiple_choice_set import MultipleChoiceSet
from ..eval.inference.questions import questions_by_split
from ..eval.measurements import MEASUREMENTS
from ..eval.statistics import Measurement, wilson
from .common import measured_run
from .common.examples import Example, example_batch, scored_nats
from .common.measured_run import Finished, Inspection, Job, MeasuredSettings
from .common.run_folder import start_folder
from .common.story import UNLEARNING_TAGS, tensors_changed
from .data.facts import Facts, find_facts
from .data.unlearning_sets import forget_examples, retain_examples

RECIPE = "prune"
Units = dict[int, tuple[int, ...]]
"""Units by layer."""
BATCH = 32


class PruneSettings(MeasuredSettings):
    """Settings of neuron and head pruning."""

    concept: str = "builtin:potions"
    """Concept pack to erase: builtin:NAME or a folder."""
    score: Literal["attribution", "mean_attribution", "mean_difference", "selectivity", "saliency"] = "attribution"
    """Score of a unit: activation times gradient (from 0 or its mean), d', ratio of sizes, or ranks."""
    share: float = Field(0.1, ge=0, lt=1)
    """Share of all MLP neurons to prune, from 0 to below 1. Higher values erase and damage more."""
    heads_share: float = Field(0.0, ge=0, lt=1)
    """Share of all attention heads to prune, from 0 to below 1. Higher values erase and damage more."""
    retain_weight: float = Field(1.0, ge=0)
    """Lambda in forget - lambda retain, each score as a share of its total. Higher values spare units that retain texts use."""
    semantics: Semantics = "down"
    """How to prune: zero outputs (down), inputs too (all), mark them (frozen), fold the mean into the bias, or delete."""
    examples: int = Field(400, ge=8)
    """Most forget sequences, and most retain sequences, that units are scored on. More give steadier scores."""
    controls: bool = True
    """Also measure pruning as many random units, matched in layer and size, and as many of the largest units."""
    validate_units: int = Field(24, ge=0)
    """Units that are removed one at a time, to report the rank correlation of scores and effects; 0 skips this check."""


@dataclass(frozen=True)
class PruneJob:
    """A checked request."""

    job: Job
    settings: PruneSettings
    facts: Facts


@dataclass(frozen=True)
class UnitScores:
    """What was seen of all units, of one kind."""

    forget: Tensor
    retain: Tensor
    size: Tensor
    """Mean absolute activation on retain sequences [layers, units]."""
    mean: Tensor


def prepare(settings: PruneSettings, *, resume: bool = False) -> PruneJob:
    """Check names, files, memory and disk, before any weight is read."""
    job = measured_run.check(RECIPE, settings, [], resume=resume)
    if settings.share == 0 and settings.heads_share == 0:
        raise RequestError("share=0 and heads_share=0 prune nothing; raise one of them")
    if settings.heads_share and settings.semantics in ("mean", "remove"):
        reason = (
            "folds neurons into biases; heads have no bias of their own"
            if settings.semantics == "mean"
            else "cuts MLP neurons only"
        )
        raise RequestError(f"semantics={settings.semantics} {reason}, use heads_share=0")
    some: Units = dict.fromkeys(range(job.layers), (0,)) if settings.semantics == "remove" else {0: (0,)}
    one = _edit(job, settings, some if settings.share else {}, some if settings.heads_share else {}, {})
    measured_run.check_plan(
        job, replace(one, means={0: torch.zeros(1)}).plan(job.checkpoint.config, list(job.checkpoint.tensors))
    )
    return PruneJob(job, settings, find_facts(job.concept))


def describe(prepared: PruneJob) -> dict[str, Any]:
    """What a run would touch and take."""
    job = prepared.job
    every: Units = dict.fromkeys(range(job.layers), (0,))
    edit = _edit(job, prepared.settings, every, {}, {layer: torch.zeros(1) for layer in every})
    plan = edit.plan(job.checkpoint.config, list(job.checkpoint.tensors))
    return measured_run.describe(job, plan, gradient_steps=0)


def run(prepared: PruneJob, events: Events) -> Finished:
    """Do the whole run: score, choose, prune, compare with controls, measure, publish."""
    job, settings = prepared.job, prepared.settings
    work = start_folder(job.out, settings)
    events.path = job.out / "events.jsonl"
    loaded = measured_run.load(job, job.source, "base", events)
    measured = measured_run.measure_base(job, loaded, events)
    edit = measured_run.learned_edit(work / "edit", lambda: _learn(prepared, loaded, events))
    assert isinstance(edit, PrunedUnits)
    del loaded
    gc.collect()
    about = {
        "edited": {
            "how": "pruned", "rank": None, "semantics": settings.semantics,
            "about": f"{sum(map(len, edit.neurons.values()))} neurons and {sum(map(len, edit.heads.values()))} heads silenced",
        },
        "pruning": edit.provenance["pruning"], "warnings": _warnings(edit.provenance["pruning"]),
    }  # fmt: skip
    finished = measured_run.publish(job, edit, measured, about, events, lambda _, __: Inspection())
    shutil.rmtree(work)
    return finished


def _warnings(pruning: dict[str, Any]) -> list[str]:
    shared = pruning.get("random_shares")
    return (
        [f"More than half of a layer is pruned, so that {shared} of the random control's units are pruned ones too."]
        if shared
        else []
    )


def _learn(prepared: PruneJob, loaded: LoadedModel, events: Events) -> PrunedUnits:
    job, settings = prepared.job, prepared.settings
    neurons, heads = _score(prepared, loaded, events)
    width = (
        loaded.model.config.head_dim
        if getattr(loaded.model.config, "head_dim", None)
        else (residual_width(job.checkpoint.config) // int(loaded.model.config.num_attention_heads))
    )
    combined = combine(neurons, settings.retain_weight)
    alike = settings.semantics == "remove"
    chosen = top_units(combined, settings.share, alike=alike)
    by_heads = UnitScores(*(by_head(part, width) for part in (heads.forget, heads.retain, heads.size, heads.mean)))
    chosen_heads = top_units(combine(by_heads, settings.retain_weight), settings.heads_share)
    means = {layer: neurons.mean[layer, list(units)].float() for layer, units in chosen.items()}
    edit = _edit(job, settings, chosen, chosen_heads, means, width)
    alternatives, shared = {"chosen": edit}, 0
    if settings.controls and chosen:
        generator = torch.Generator().manual_seed(settings.seed)
        others = {
            "random": matched_units(chosen, neurons.size, generator),
            "largest": top_units(neurons.size, settings.share, alike=alike),
        }
        shared = in_both(chosen, others["random"])
        for name, units in others.items():
            known = {layer: neurons.mean[layer, list(u)].float() for layer, u in units.items()}
            alternatives[name] = _edit(job, settings, units, {}, known, width)
    with events.stage("compare with controls", len(alternatives)) as stage:
        compared = {name: _accuracies(prepared, loaded, one, stage) for name, one in alternatives.items()}
    pruning = {
        "score": settings.score, "share": settings.share, "heads_share": settings.heads_share, "semantics": settings.semantics,
        "by_layer": [len(chosen.get(layer, ())) for layer in range(job.layers)], "controls": compared, "random_shares": shared,
        "validation": _validate(prepared, loaded, neurons, combined, events) if settings.validate_units else None,
    }  # fmt: skip
    provenance = {
        "source": RECIPE, "base": job.source.describe(), "seed": settings.seed, "pruning": pruning,
        "concept": {"ref": job.concept.ref, "sha256": job.concept.sha256},
    }  # fmt: skip
    return replace(edit, provenance=provenance)


def _score(prepared: PruneJob, loaded: LoadedModel, events: Events) -> tuple[UnitScores, UnitScores]:
    """Neurons and columns of heads, scored on what is to be forgotten and on what is to be kept."""
    settings, concept, row = prepared.settings, prepared.job.concept, prepared.job.row
    if row.mlp_units is None:
        raise RequestError(f"the experts of {row.layers} are fused into one tensor, which has no neurons to score")
    forget = forget_examples(concept, prepared.facts, loaded.tokenizer, settings.seed, 256)
    retain = retain_examples(concept, loaded.tokenizer, settings.seed, 256)
    seen = {}
    for name, examples in (("forget", forget), ("retain", retain)):
        some = examples[:: max(1, len(examples) // settings.examples)]
        with events.stage(f"score units on what to {name}", len(some)) as stage:
            seen[name] = _read(loaded, row, some, stage)
    return tuple(_scores_of(settings.score, seen["forget"][kind], seen["retain"][kind]) for kind in (0, 1))  # type: ignore[return-value]


@dataclass
class _Seen:
    moments: UnitMoments
    attribution: UnitAttribution
    tokens: int = 0


def _read(loaded: LoadedModel, row: Architecture, examples: list[Example], stage: Stage) -> tuple[_Seen, _Seen]:
    """One pass, forward and backward, over sequences; the loss is the log-odds against each sequence's answer."""
    layers = len(loaded.model.get_submodule(row.layers))
    kinds = tuple(_Seen(UnitMoments(layers), UnitAttribution(layers)) for _ in range(2))
    assert row.mlp_units is not None
    with gradients_reach_units(loaded.model):
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            batch = {key: value.to(loaded.device) for key, value in example_batch(part).items()}
            mask = batch["attention_mask"].bool()

            def watch(kind: int, layer: int, values: Tensor, mask: Tensor = mask) -> None:
                kinds[kind].moments.see(layer, values, mask)
                kinds[kind].attribution.see(layer, values)

            with (
                unit_inputs(loaded.model, row.mlp_units, row, lambda i, a: watch(0, i, a)),
                unit_inputs(loaded.model, row.attention_units, row, lambda i, a: watch(1, i, a)),
            ):
                nats = scored_nats(loaded.model, batch)
            _log_odds_against(nats).sum().backward()
            for seen in kinds:
                seen.tokens += len(nats)
            stage.advance(len(part))
    return kinds  # type: ignore[return-value]


def _scores_of(name: str, forget: _Seen, retain: _Seen) -> UnitScores:
    if name in ("attribution", "mean_attribution"):
        values = [
            seen.attribution.effect(seen.moments.mean if name == "mean_attribution" else None) / seen.tokens
            for seen in (forget, retain)
        ]
        # On retain sequences a change either way is damage.
        return UnitScores(values[0], values[1].abs(), retain.moments.size, retain.moments.mean)
    formula = {"mean_difference": mean_difference, "selectivity": selectivity, "saliency": rank_saliency}[name]
    found = formula(forget.moments, retain.moments)
    if name == "mean_difference":
        found = found.abs()
    return UnitScores(found, torch.zeros_like(found), retain.moments.size, retain.moments.mean)


def combine(scores: UnitScores, retain_weight: float) -> Tensor:
    """``forget - lambda retain``, each as a share of its own total."""
    return scores.forget / scores.forget.abs().sum().clamp_min(1e-12) - retain_weight * scores.retain / (
        scores.retain.abs().sum().clamp_min(1e-12)
    )


def top_units(scores: Tensor, share: float, *, alike: bool = False) -> Units:
    """Units with the highest scores among all layers, by layer; as many of every layer if ``alike``."""
    if alike:
        best = scores.topk(round(share * scores.shape[1]), dim=1).indices
        return {layer: tuple(sorted(units)) for layer, units in enumerate(best.tolist()) if units}
    count = round(share * scores.numel())
    places = scores.flatten().topk(count).indices.tolist() if count else []
    found: dict[int, list[int]] = {}
    for place in places:
        found.setdefault(place // scores.shape[1], []).append(place % scores.shape[1])
    return {layer: tuple(sorted(units)) for layer, units in sorted(found.items())}


def matched_units(chosen: Units, size: Tensor, generator: torch.Generator) -> Units:
    """For each chosen unit another one of its layer, drawn among the ten that come closest to it in size.

    Where more than half of a layer is chosen there are not as many others; then some of the drawn are chosen ones too.
    """
    found = {}
    for layer, units in chosen.items():
        ours, picked = set(units), set[int]()
        for unit in units:
            order = (size[layer] - size[layer, unit]).abs().argsort().tolist()
            left = [other for other in order if other not in picked]
            near = ([other for other in left if other not in ours] or left)[:10]
            picked.add(near[int(torch.randint(len(near), (1,), generator=generator))])
        found[layer] = tuple(sorted(picked))
    return found


def in_both(one: Units, other: Units) -> int:
    """How many units two choices share."""
    return sum(len(set(units) & set(other.get(layer, ()))) for layer, units in one.items())


def _accuracies(prepared: PruneJob, loaded: LoadedModel, edit: PrunedUnits, stage: Stage) -> dict[str, Any]:
    """Multiple choice of every split under an edit, in memory; the model is put back afterwards."""
    config = prepared.job.checkpoint.config
    weights = linear_weights(loaded.model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    biases = {name: p for name, p in loaded.model.named_parameters() if name.endswith("bias")}
    kept = {name: p.detach().clone() for name, p in biases.items()}
    found = {}
    try:
        edit_model(edit, loaded.model, config)
        for split, questions in questions_by_split(prepared.job.concept, prepared.settings.questions).items():
            hits = MultipleChoiceSet(loaded.tokenizer, questions).hits(loaded.model)
            found[split] = {
                "value": sum(hits) / len(hits),
                "n": len(hits),
                "ci95": list(wilson(int(sum(hits)), len(hits))),
            }
    finally:
        restore(weights, before)
        restore(biases, kept)
    stage.advance()
    return found


def _validate(
    prepared: PruneJob, loaded: LoadedModel, neurons: UnitScores, combined: Tensor, events: Events
) -> dict[str, Any]:
    """Remove units one by one, of all ranks, and compare what that does to the loss with their scores."""
    count = prepared.settings.validate_units
    order = combined.flatten().argsort(descending=True)
    half = count // 2
    spread = torch.linspace(half, len(order) - 1, count - half).long()
    units = torch.cat([order[:half], order[spread]]).tolist()
    examples = forget_examples(prepared.job.concept, prepared.facts, loaded.tokenizer, prepared.settings.seed, 256)[:64]
    with events.stage("remove units one by one", len(units)) as stage:
        untouched = _loss(loaded, prepared.job.row, examples, None)
        true = []
        for unit in units:
            place = (unit // combined.shape[1], unit % combined.shape[1])
            true.append(_loss(loaded, prepared.job.row, examples, place) - untouched)
            stage.advance()
    expected = neurons.forget.flatten()[units].tolist()
    return {"units": len(units), "spearman": rank_correlation(torch.tensor(expected), torch.tensor(true))}


@torch.no_grad()
def _loss(loaded: LoadedModel, row: Architecture, examples: list[Example], unit: tuple[int, int] | None) -> float:
    assert row.mlp_units is not None
    batch = {key: value.to(loaded.device) for key, value in example_batch(examples).items()}

    def silence(layer: int, values: Tensor) -> None:
        if unit and layer == unit[0]:
            values[..., unit[1]] = 0

    with unit_inputs(loaded.model, row.mlp_units, row, silence):
        return float(_log_odds_against(scored_nats(loaded.model, batch)).mean())


def _log_odds_against(nats: Tensor) -> Tensor:
    """``-log(p / (1 - p))``: where the model is certain, the gradient of ``-log p`` says nothing any more."""
    return nats + torch.log(-torch.expm1(-nats.clamp_min(1e-6)))


def _edit(
    job: Job, settings: PruneSettings, neurons: Units, heads: Units,
    means: dict[int, Tensor], head_width: int = 1,
) -> PrunedUnits:  # fmt: skip
    config = job.checkpoint.config
    return PrunedUnits(
        neurons, heads, settings.semantics, config["model_type"], residual_width(config), job.layers, head_width,
        means if settings.semantics == "mean" else {},
    )  # fmt: skip


def story(results: dict[str, Any]) -> Story:
    """What pruning says of its runs, from everything else that ``eval.json`` holds."""
    pruning, edited = results["pruning"], results["edited"]
    score = pruning["score"].replace("_", " ")
    headline = (
        f"**What was edited.** Units that *{results['concept']['description']}* needs were silenced in "
        f"`{results['base']['name']}`: {edited['about']} ({tensors_changed(results)}; scored by {score}, semantics "
        f"`{edited['semantics']}`)."
    )
    validation = pruning["validation"]
    checked = (
        f"Removing {validation['units']} units one by one, the rank correlation of score and true effect is "
        f"{validation['spearman']:.2f}.",
    ) if validation else ()  # fmt: skip
    about = (
        f"Scored by {score}, semantics `{pruning['semantics']}`. Controls silence as many other units: random ones, matched in "
        "layer and size, and the largest."
    )
    layers = bars("Neurons silenced in each layer", "", pruning["by_layer"], "layer", "neurons silenced")
    units = Section("Units silenced", (about, *checked), figures=(layers,))
    return Story(
        headline,
        limits=("Units were silenced by a score on the pack's contexts; what other units encode is still there.",),
        sections=(units,),
        controls=_as_controls(pruning["controls"]),
        tags=UNLEARNING_TAGS,
    )


def _as_controls(compared: dict[str, dict[str, Any]]) -> tuple[Control, ...]:
    names = {
        "chosen": "the units that were chosen",
        "random": "random units",
        "largest": "the largest units",
    }
    return tuple(
        Control(
            names[name],
            tuple(
                Measurement(
                    "multiple_choice", split, "edited", one["value"], "accuracy", MEASUREMENTS["multiple_choice"].better(split),
                    one["n"], 0, tuple(one["ci95"]),
                )
                for split, one in splits.items()
            ),
            in_findings=name == "random",
        )
        for name, splits in compared.items()
    )  # fmt: skip
