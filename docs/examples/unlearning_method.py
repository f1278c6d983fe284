"""A new unlearning loss: one settings class, which is its formula too. Here: gradient ascent that stops at a margin.

python docs/examples/unlearning_method.py OUT [KEY=VALUE ...]
"""

import sys
from pathlib import Path

from excise.artifacts.events import Events
from excise.recipes import RECIPES, Recipe
from excise.recipes.common.settings import load_settings
from excise.recipes.unlearning.recipe import UnlearningSettings, describe, prepare, run
from excise.recipes.unlearning.story import story
from pydantic import Field
from torch import Tensor

__all__ = ["HingeSettings", "describe", "prepare", "run", "story"]


class HingeSettings(UnlearningSettings):
    """Hinge: ``max(0, margin + log p(y) / |y|)``, which is 0 once an answer is unlikely enough."""

    recipe = "hinge"
    margin: float = Field(5.0, gt=0)
    """Nats a token below which an answer counts as forgotten. Higher values erase more and damage more."""

    def forget_loss(self, nll: Tensor, lengths: Tensor, base_log_likelihoods: Tensor) -> Tensor:
        """Mean over the sequences to forget."""
        return (self.margin - nll / lengths).relu().mean()


RECIPES["hinge"] = Recipe(__name__, "HingeSettings", "raise the loss on the concept up to a margin")

if __name__ == "__main__":
    job = prepare(load_settings(HingeSettings, None, sys.argv[2:], {"out": Path(sys.argv[1])}))
    print(describe(job))
    results = run(job, Events()).results
    print([(m["subject"], round(m["value"], 3)) for m in results["measurements"] if m["split"] == "forget_T"])
