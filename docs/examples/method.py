"""A new method: a settings class and three functions. Here: a low-rank update that makes answers on the concept uniform.

python docs/examples/method.py OUT [KEY=VALUE ...]
"""

import random
import sys
from pathlib import Path
from typing import Any

from excise.artifacts.events import Events
from excise.artifacts.models.load import LoadedModel
from excise.recipes import RECIPES, Recipe
from excise.recipes.common import adapter_run
from excise.recipes.common.adapter_run import AdapterJob, AdapterSettings, TrainingPlan
from excise.recipes.common.examples import cycled, example_batch
from excise.recipes.common.measured_run import Finished
from excise.recipes.common.settings import load_settings
from excise.recipes.common.tokens import text_limit
from excise.recipes.data.facts import find_facts
from excise.recipes.data.unlearning_sets import forget_examples, retain_examples
from torch import Tensor, nn


class UniformSettings(AdapterSettings):
    """Toward a uniform distribution on the concept, and toward the data on everything else."""

    retain_weight: float = 1.0
    """Weight of the retain term. Higher values protect other topics; lower values erase more."""


def prepare(settings: UniformSettings, *, resume: bool = False) -> AdapterJob:
    """Check everything before a weight is read."""
    return adapter_run.prepare("uniform", settings, resume=resume)


def describe(job: AdapterJob) -> dict[str, Any]:
    """What a run would touch."""
    return adapter_run.describe(job)


def run(job: AdapterJob, events: Events) -> Finished:
    """Train, merge, measure and publish; only the plan is this method's own."""
    return adapter_run.run(job, lambda loaded, seen, work: plan(job, loaded), "edited toward uniform answers", events)


def plan(job: AdapterJob, loaded: LoadedModel) -> TrainingPlan:
    """What to train on, and with which loss."""
    settings, concept, limit = job.settings, job.concept, text_limit(loaded.model)
    assert isinstance(settings, UniformSettings)
    weight = settings.retain_weight
    forget = forget_examples(concept, find_facts(concept), loaded.tokenizer, settings.seed, limit)
    retain = retain_examples(concept, loaded.tokenizer, settings.seed, limit)
    count = settings.steps * settings.batch_size
    pairs = list(zip(cycled(forget, count, random.Random(0)), cycled(retain, count, random.Random(1)), strict=True))

    def collate(some: list[Any]) -> dict[str, Any]:
        # Forget rows first, then retain rows.
        return {**example_batch([*(f for f, _ in some), *(r for _, r in some)]), "forget": len(some)}

    def loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        # rows and places say at which positions a scored token is predicted, tokens which it is.
        log_p = model(**inputs).logits[batch["rows"], batch["places"]].float().log_softmax(-1)
        told = log_p.gather(-1, batch["tokens"][:, None])[:, 0]
        erase = batch["rows"] < batch["forget"]
        return {"forget": -log_p[erase].mean(), "retain": -weight * told[~erase].mean()}

    rows = [example.ids for example in (*forget[:8], *retain[:8])]
    training = {
        "about": "Toward uniform answers.", "steps": settings.steps, "rows": 2 * settings.batch_size,
        "data": f"{len(forget)} sequences to forget, {len(retain)} to retain",
    }  # fmt: skip
    return TrainingPlan(pairs, collate, loss, rows, training, {"warnings": list(job.warnings)})


RECIPES["uniform"] = Recipe(__name__, "UniformSettings", "push answers on the concept toward a uniform distribution")

if __name__ == "__main__":
    job = prepare(load_settings(UniformSettings, None, sys.argv[2:], {"out": Path(sys.argv[1])}))
    print(describe(job))
    results = run(job, Events()).results
    print([(m["subject"], round(m["value"], 3)) for m in results["measurements"] if m["split"] == "forget_T"])
