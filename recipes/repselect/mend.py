"""Training after the step, which mends what must stay: toward the base there, and toward where the step ended on the concept.

The step is long and cares for nothing else, so that what it took from other topics is small in each weight and wide: a few
steps of training find it again. They read nothing about the concept but what the model after the step says of it.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.originals import originals_of
from ...artifacts.events import Events
from ...artifacts.models.load import LoadedModel
from ...editing.edits.dense import DenseUpdate
from ...editing.edits.in_place import edits_in_place
from ...eval.inference import multiple_choice_set
from ..common import adapter_run, kl_budget
from ..common.examples import spread
from ..common.memory_plan import RunMemory, StageMemory
from ..common.tokens import text_limit
from ..data.unlearning_sets import forget_examples, retain_examples
from ..distill.training import DistillTraining, Start, predictions, stages
from .after import together
from .request import RECIPE, RepselectJob

FOLDER = "mending"
"""In the run's working folder: what the training keeps."""


def mended(job: RepselectJob, loaded: LoadedModel, edit: DenseUpdate, work: Path, events: Events) -> DenseUpdate:
    """An edit of the base and what training adds to it, as one; the provenance says what either left.

    Args:
        loaded: The base, which is the base again afterwards, bit for bit.
        edit: Where training begins.
    """
    assert job.mending is not None, "it is asked for where steps are"
    mending, run, model = job.mending, job.adapter.run, loaded.model
    settings, concept = job.settings.mend_settings(), job.mending.concept
    limit, seed = text_limit(model), settings.seed
    stays = list(dict.fromkeys(one.ids for one in retain_examples(concept, loaded.tokenizer, seed, limit)))
    forget = list(dict.fromkeys(one.ids for one in forget_examples(concept, job.facts, loaded.tokenizer, seed, limit)))
    # Rows that no step will read need no targets.
    forget = spread(forget, settings.steps * settings.batch_size, f"excise mend {seed}")
    with events.stage("read what must stay", len(stays)) as stage:
        kept = predictions(model, stays, settings, stage, term="retain")
        texts = kl_budget.budget_texts(loaded, run.concept, settings.kl_prompts, run.measured)
    with edits_in_place(model, model.config.to_dict(), originals_of(run.checkpoint, model)) as tries:
        tries.apply(edit)
        with events.stage("measure the model before it is mended"):
            before = _about(loaded, job, texts)
        with events.stage("read what is left of the concept", len(forget)) as stage:
            left = predictions(model, forget, settings, stage, term="erase")

        def training(*_: Any) -> DistillTraining:
            return DistillTraining(mending, left, kept, Start("Mending of what must stay."))

        (work / FOLDER).mkdir(exist_ok=True)
        learned = adapter_run.learn(mending, loaded, training, work / FOLDER, events)
    assert isinstance(learned, DenseUpdate), "whole weights are trained"
    whole = together({name: delta.values for name, delta in edit.deltas.items()}, learned)
    counts = {"sequences": len(left), "sequences_to_retain": len(kept)}
    about = {"steps": settings.steps, "learning_rate": settings.learning_rate, **counts, "before": before}
    recorded = {**edit.provenance[RECIPE], "mended": about}
    return replace(whole, provenance={**edit.provenance, RECIPE: recorded})


def planned_mending(job: RepselectJob, needs: RunMemory, edit: int) -> list[StageMemory]:
    """What it holds in memory: one model at a time, and the edit where training begins."""
    assert job.mending is not None, "it is asked for where steps are"
    reading, train = stages(needs, job.mending, job.facts)
    alone = replace(reading, name="read what must stay", weights=needs.weights)
    return [replace(stage, kept=stage.kept + edit) for stage in (alone, replace(train, name="mend"))]


def _about(loaded: LoadedModel, job: RepselectJob, texts: kl_budget.BudgetTexts) -> dict[str, Any]:
    """How far a model is from the base, and what it answers."""
    run = job.adapter.run
    answered = multiple_choice_set.accuracies(loaded.model, loaded.tokenizer, run.measured, run.settings.questions)
    return {"kl": kl_budget.divergence(loaded.model, texts), "texts": len(texts.texts), "accuracies": answered}
