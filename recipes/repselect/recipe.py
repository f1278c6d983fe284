"""RepSelect: one step up the loss on the concept, with the leading components of the gradient made smaller.

What the leading components hold is shared with other topics: moving along them damages those, and little training brings
it back. The step is taken from the stored weights, as long as a budget of divergence allows.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...artifacts.events import Events, Stage
from ...artifacts.models.load import LoadedModel, load_model
from ...editing.edits.base import WeightEdit
from ...editing.edits.dense import Delta, DenseUpdate
from ...editing.errors import EditError
from ...editing.modules import is_conv1d
from ...editing.numerics.spectrum import leading_components, reshaped
from ...editing.training.adapters import attach, detach
from ...eval.inference import multiple_choice_set
from ..common import measured_run
from ..common.measured_run import Finished, Inspection
from ..common.memory_plan import MemoryPlan, RunMemory, StageMemory, fit_step
from ..common.memory_sizes import Gradients, Rows, largest_of
from ..common.tokens import text_limit
from ..data.unlearning_sets import retain_examples
from .after import EditedModel, differences, together
from .controls import accuracies
from .gradients import BATCH, base_weights, gradients, sequences_to_forget, train_adversary
from .mend import mended, planned_mending
from .request import RECIPE, RepselectJob, RepselectSettings, all_numbers, components_of, describe, prepare
from .story import story

__all__ = ["RepselectSettings", "describe", "learn", "memory", "prepare", "run", "story"]


NOTHING = 1e-5
"""Share of a gradient that is rounding."""


@dataclass(frozen=True)
class Learned:
    """The step as long as the weights themselves, and the same without anything made smaller."""

    edit: DenseUpdate
    plain: DenseUpdate | None
    """None where no controls are asked for."""


def memory(job: RepselectJob) -> MemoryPlan:
    """What a run would hold in memory."""
    needs, settings, adapter = RunMemory.of(job.adapter.run), job.settings, job.adapter
    texts = [text.text for text in adapter.concept.forget] + [q.prompt for q in adapter.concept.questions]
    longest, sums = needs.longest(texts, needs.text_limit), 4 * job.numbers
    rows = Rows(BATCH, longest)
    if needs.tokenizes():
        examples = sequences_to_forget(job, needs.tokenizer, needs.text_limit)
        rows = largest_of(sorted(len(one.ids) for one in examples), BATCH)
        longest = max(len(one.ids) for one in examples)
    stages = [needs.training(adapter, Rows(settings.batch_size, longest))] if settings.adversary else []
    kept = sums * (2 if settings.basis == "retain" else 1)
    beside = needs.sizes.head(adapter.run.device)
    room = needs.room - needs.weights - needs.baseline - kept - beside
    step = fit_step(needs.sizes, Gradients(), rows, room)
    stages.append(
        StageMemory(
            f"sum gradients{step.in_words()}", needs.weights, work=step.size + beside, kept=kept + needs.baseline
        )
    )
    # The gradient, what is left of it, and a copy of one of them at the strength that is tried.
    copies = (3 if settings.controls else 2) * sums if adapter.run.device.type == "cpu" else 0
    tried = needs.measuring("choose the strength")
    stages.append(replace(tried, kept=tried.kept + copies))
    edit = 4 * all_numbers(adapter.run.checkpoint) if job.after or job.mending else sums
    if job.after:
        # The edited model stands beside the base, and which of its weights differ is seen once they are read.
        stages = [replace(stage, weights=stage.weights + needs.weights) for stage in stages]
    if job.mending:
        stages += planned_mending(job, needs, edit if adapter.run.device.type == "cpu" else 0)
    return needs.measured_run(stages, edit=edit)


def run(job: RepselectJob, events: Events) -> Finished:
    """Do the whole run: take gradients, reshape them, choose the strength, measure, publish."""
    checked = job.adapter.run
    work = measured_run.start(checked)
    events.path = checked.out / "events.jsonl"
    loaded = measured_run.load(checked, checked.source, "base", events)
    measured = measured_run.measure_base(checked, loaded, events)
    edit = measured_run.learned_edit(work, lambda: _whole_edit(job, loaded, work, events))
    del loaded
    about = edit.provenance[RECIPE]
    where = f"on {job.adapter.shape.describe()} of {len(job.adapter.layers)} layers"
    content = {
        "edited": {"how": "edited with RepSelect", "layers": list(job.adapter.layers), "about": where},
        RECIPE: about,
        "warnings": [*job.adapter.warnings, *_warnings(about)],
    }
    finished = measured_run.publish(checked, edit, measured, content, events, lambda *_: Inspection())
    shutil.rmtree(work)
    return finished


def _warnings(about: dict[str, Any]) -> list[str]:
    few = about["fewer_components"]
    return (
        [
            f"{few} of {about['matrices']} gradients have fewer than {about['components']} components; give more texts to"
            " forget, or lower components."
        ]
        if few
        else []
    )


def learn(job: RepselectJob, loaded: LoadedModel, events: Events, work: Path, _: dict[str, Any]) -> WeightEdit:
    """The edit alone, for a search; the base is unchanged afterwards."""
    job.settings.check_searchable()
    return _learn(job, loaded, work, events).edit


def _whole_edit(job: RepselectJob, loaded: LoadedModel, work: Path, events: Events) -> WeightEdit:
    """The step, and what mends it, as one edit of the base."""
    edit = _step_of_base(job, loaded, work, events)
    return edit if job.mending is None else mended(job, loaded, edit, work, events)


def _step_of_base(job: RepselectJob, loaded: LoadedModel, work: Path, events: Events) -> DenseUpdate:
    """The step from the base, or from an edited model together with the edit that made it."""
    if job.after is None:
        return _within_budget(job, loaded, work, events)
    run = job.adapter.run
    with events.stage("load the edited model"):
        edited = load_model(job.after.source, run.device, run.dtype, prompts=job.settings.prompt_format())
    stored = job.after.checkpoint
    of_step = replace(job, adapter=replace(job.adapter, run=replace(run, checkpoint=stored)))
    step = _within_budget(of_step, edited, work, events, "model before the step")
    before = differences(loaded, run.checkpoint, edited, stored)
    _check_changed(before, job.after)
    with events.stage("measure the model before the step"):
        answered = multiple_choice_set.accuracies(edited.model, edited.tokenizer, run.measured, run.settings.questions)
    about = {**step.provenance[RECIPE], "after": {"name": job.after.source.name, "accuracies": answered}}
    return together(before, replace(step, provenance={**step.provenance, RECIPE: about}))


def _check_changed(before: Mapping[str, Tensor], after: EditedModel) -> None:
    if not before:
        raise EditError(f"{after.source.name} has the weights of the base, so that there is no edit to go on from")


def _within_budget(job: RepselectJob, loaded: LoadedModel, work: Path, events: Events, of: str = "base") -> DenseUpdate:
    """The step as long as the budget allows, and what the plain gradient does at the same budget.

    Args:
        loaded: The model that the step is taken from.
        of: What it is, in words.
    """
    checked, learned = job.adapter.run, _learn(job, loaded, work, events)
    edit = measured_run.within_budget(checked, learned.edit, loaded, events, of=of)
    assert isinstance(edit, DenseUpdate)
    if learned.plain is None:
        return edit
    plain = measured_run.within_budget(checked, learned.plain, loaded, events, of=of)
    with events.stage("measure the plain gradient"):
        compared = {"plain": accuracies(checked, loaded, plain)}
    return replace(edit, provenance={**edit.provenance, RECIPE: {**edit.provenance[RECIPE], "controls": compared}})


def _learn(job: RepselectJob, loaded: LoadedModel, work: Path, events: Events) -> Learned:
    """Gradients of the base with an adversary beside it, and what becomes of them."""
    settings, adapter, model = job.settings, job.adapter, loaded.model
    examples = sequences_to_forget(job, loaded.tokenizer, text_limit(model))
    names, steps = adapter.shape.weights, 0
    sizes = {name: float(model.get_parameter(name).detach().float().norm()) for name in names}
    inputs_first = {name: _inputs_first(model, name) for name in names}
    rest = _of_what_stays(job, loaded, events) if settings.basis == "retain" else {}
    adapted = attach(model, adapter.shape, settings.seed)
    try:
        if settings.adversary:
            steps = train_adversary(job, adapted, examples, events, work)
        adapted.eval()
        forget = gradients(adapter, adapted, base_weights(adapted, names), examples, events, "of the concept")
    finally:
        detach(adapted)
    plain = {name: -gradient.cpu() for name, gradient in forget.items()}
    with events.stage("reshape gradients", len(names)) as stage:
        selected, fewer = _reshaped(job, forget, rest, inputs_first, stage)
    length = math.sqrt(sum(size**2 for size in sizes.values()))
    about = {
        **{key: getattr(settings, key) for key in ("scored", "rule", "sides", "basis", "adversary_rate")},
        "sequences": len(examples),
        "tokens": sum(len(one.ids) - one.start for one in examples),
        "components": components_of(settings, adapter),
        "matrices": sum(max(1, adapter.shape.experts.get(name, 1)) for name in names),
        "fewer_components": fewer,
        "adversary_steps": steps,
        "share_left": _norm(selected) / max(_norm(plain), 1e-30),
    }
    edit = _step(job, selected, length, about)
    return Learned(edit, _step(job, plain, length, about) if settings.controls else None)


def _of_what_stays(job: RepselectJob, loaded: LoadedModel, events: Events) -> dict[str, Tensor]:
    """Gradients of the base on retain texts."""
    adapter, model = job.adapter, loaded.model
    weights = {name: model.get_parameter(name) for name in adapter.shape.weights}
    examples = retain_examples(adapter.concept, loaded.tokenizer, job.settings.seed, text_limit(model))
    return gradients(adapter, model, weights, examples, events, "of what must stay")


def _inputs_first(model: nn.Module, name: str) -> bool:
    """Whether a weight is stored [inputs, outputs]."""
    module = model.get_submodule(name.rpartition(".")[0])
    return is_conv1d(module) or bool(getattr(module, "is_transposed", False))


def _reshaped(
    job: RepselectJob,
    forget: dict[str, Tensor],
    rest: dict[str, Tensor],
    inputs_first: Mapping[str, bool],
    stage: Stage,
) -> tuple[dict[str, Tensor], int]:
    """What each weight is to be moved by, up to one factor, and how many gradients have fewer components than asked for."""
    settings, count = job.settings, components_of(job.settings, job.adapter)
    selected, fewer = dict[str, Tensor](), 0
    for name in list(forget):
        # Freed one by one: the sums are as large as the weights in fp32.
        gradient = forget.pop(name)
        basis = leading_components(rest.pop(name) if rest else gradient, count, settings.seed)
        whole = basis.real().sum(-1) == min(count, *gradient.shape[-2:])
        fewer += int((~whole).sum())
        left = reshaped(gradient, basis, settings.rule, settings.sides, inputs_first=inputs_first[name])
        selected[name] = -left.cpu()
        stage.advance(1)
    return selected, fewer


def _step(job: RepselectJob, step: Mapping[str, Tensor], length: float, about: dict[str, Any]) -> DenseUpdate:
    """A step as long as the weights that it is added to, so that the strength that a budget chooses is a share of them.

    Raises:
        EditError: Nothing is left to step along.
    """
    run, size = job.adapter.run, _norm(step)
    if not size > 0 or about["share_left"] < NOTHING:
        raise EditError(
            "nothing is left of the gradients of the concept; lower components, use rule=soft, or give more texts to forget"
        )
    provenance = {
        "source": RECIPE,
        "base": run.source.describe(),
        "seed": job.settings.seed,
        "concept": {"ref": run.concept.ref, "sha256": run.concept.sha256},
        RECIPE: about,
    }
    edit = job.adapter.edit(
        DenseUpdate, {name: Delta(values * (length / size)) for name, values in step.items()}, provenance
    )
    assert isinstance(edit, DenseUpdate)
    return edit


def _norm(tensors: Mapping[str, Tensor]) -> float:
    """Frobenius norm of all of them together."""
    return math.sqrt(sum(float(one.norm()) ** 2 for one in tensors.values()))
