"""A new method of another kind: settings, four functions, and what to train. Here: toward uniform answers.

python docs/examples/method.py OUT [KEY=VALUE ...]
"""

import random
import sys
from pathlib import Path
from typing import Any

from excise.artifacts.events import Events
from excise.artifacts.models.load import LoadedModel
from excise.artifacts.reporting.sections import Story
from excise.recipes import RECIPES, Recipe
from excise.recipes.common import adapter_job, adapter_run
from excise.recipes.common.adapter_job import AdapterJob, AdapterSettings
from excise.recipes.common.adapter_run import Training
from excise.recipes.common.examples import Example, cycled, example_batch
from excise.recipes.common.measured_run import Finished
from excise.recipes.common.settings import load_settings
from excise.recipes.common.story import LOW_RANK_LIMIT, training_section
from excise.recipes.common.tokens import text_limit
from excise.recipes.data.facts import find_facts
from excise.recipes.data.unlearning_sets import forget_examples, retain_examples
from pydantic import Field
from torch import Tensor, nn


class UniformSettings(AdapterSettings):
    """Toward a uniform distribution on the concept, and toward the data on everything else."""

    retain_weight: float = Field(1.0, ge=0)
    """Weight of the retain term. Higher values protect other topics; lower values erase more."""


def prepare(settings: UniformSettings, *, resume: bool = False) -> AdapterJob:
    """Check everything before a weight is read."""
    return adapter_job.prepare("uniform", settings, resume=resume)


def describe(job: AdapterJob) -> dict[str, Any]:
    """What a run would touch."""
    return adapter_job.describe(job)


def run(job: AdapterJob, events: Events) -> Finished:
    """Measure, train, merge, measure again and publish; only the training is this method's own."""
    return adapter_run.run(
        job, "edited toward uniform answers", lambda loaded, *_: UniformTraining(job, loaded), events
    )


def story(results: dict[str, Any]) -> Story:
    """What card, report and findings say of a run; without it they say what can be said of any training."""
    headline = (
        f"**What was edited.** Answers on *{results['concept']['description']}* were pushed toward a uniform"
        " distribution."
    )
    return Story(headline, limits=(LOW_RANK_LIMIT,), sections=(training_section(results),))


class UniformTraining(Training):
    """Pairs of a sequence to forget and one to retain."""

    def __init__(self, job: AdapterJob, loaded: LoadedModel):
        assert isinstance(job.settings, UniformSettings)
        self.settings, limit = job.settings, text_limit(loaded.model)
        seed, count = self.settings.seed, self.settings.steps * self.settings.batch_size
        forget = forget_examples(job.concept, find_facts(job.concept), loaded.tokenizer, seed, limit)
        retain = retain_examples(job.concept, loaded.tokenizer, seed, limit)
        rng = random.Random(f"uniform {seed}")
        self.rows = list(zip(cycled(forget, count, rng), cycled(retain, count, rng), strict=True))
        # The merged checkpoint must agree with base and adapter on these.
        self.checked_rows = [example.ids for example in (*forget[:8], *retain[:8])]
        self.data = f"{len(forget)} sequences to forget, {len(retain)} to retain"

    def collate(self, rows: list[tuple[Example, Example]]) -> dict[str, Any]:
        """Forget rows first, then retain rows."""
        return {**example_batch([*(f for f, _ in rows), *(r for _, r in rows)]), "forget": len(rows)}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Cross-entropy with the uniform distribution, and with the retain tokens; a mean over scored tokens."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        # rows and places say at which positions a scored token is predicted, tokens which one it is.
        log_p = model(**inputs).logits[batch["rows"], batch["places"]].float().log_softmax(-1)
        told = log_p.gather(-1, batch["tokens"][:, None])[:, 0]
        erase = batch["rows"] < batch["forget"]
        return {"forget": -log_p[erase].mean(), "retain": -self.settings.retain_weight * told[~erase].mean()}

    def report(self, model: Any) -> dict[str, Any]:
        """What eval.json, card and report say about the training."""
        steps, rows = self.settings.steps, 2 * self.settings.batch_size
        about = {"about": "Toward uniform answers.", "steps": steps, "rows": rows, "data": self.data}
        return {"training": about, "warnings": []}


RECIPES["uniform"] = Recipe(__name__, "UniformSettings", "push answers on the concept toward a uniform distribution")

if __name__ == "__main__":
    job = prepare(load_settings(UniformSettings, None, sys.argv[2:], {"out": Path(sys.argv[1])}))
    print(describe(job))
    results = run(job, Events()).results
    print([(m["subject"], round(m["value"], 3)) for m in results["measurements"] if m["split"] == "forget_T"])
