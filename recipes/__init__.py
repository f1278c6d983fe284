"""Whole runs: each recipe reads from top to bottom."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One line of the table; the module is imported when the recipe runs."""

    module: str
    settings: str
    about: str
    space: str = ""
    """``module:name`` of what a search of its settings varies; empty where it has none ready."""


RECIPES: dict[str, Recipe] = {
    "orthogonalize": Recipe(
        "excise.recipes.orthogonalize.recipe",
        "OrthogonalizeSettings",
        "take a direction out of every weight that writes it",
        "excise.recipes.orthogonalize.space:READY",
    ),
    "elm": Recipe(
        "excise.recipes.elm.recipe",
        "ElmSettings",
        "erase a concept with low-rank updates toward a novice",
        "excise.recipes.elm.space:READY",
    ),
    "prune": Recipe(
        "excise.recipes.prune.recipe",
        "PruneSettings",
        "silence the neurons and heads that a concept needs",
        "excise.recipes.prune.space:READY",
    ),
    "caft": Recipe(
        "excise.recipes.caft.recipe",
        "CaftSettings",
        "fine-tune with concepts ablated, so that they are not what is learned",
        "excise.recipes.caft.space:READY",
    ),
    "lorra": Recipe(
        "excise.recipes.lorra.recipe",
        "LorraSettings",
        "tune representations along a reading vector, toward a concept or away",
        "excise.recipes.lorra.space:READY",
    ),
    "rmu": Recipe(
        "excise.recipes.unlearning.rmu",
        "RmuSettings",
        "steer activations on the concept toward a random vector",
        "excise.recipes.unlearning.space:READY_RMU",
    ),
    "grad_diff": Recipe(
        "excise.recipes.unlearning.grad_diff",
        "GradDiffSettings",
        "raise the loss on the concept, lower it on the rest",
        "excise.recipes.unlearning.space:READY",
    ),
    "npo": Recipe(
        "excise.recipes.unlearning.npo",
        "NpoSettings",
        "negative preference optimization against the base",
        "excise.recipes.unlearning.space:READY",
    ),
    "simnpo": Recipe(
        "excise.recipes.unlearning.simnpo",
        "SimNpoSettings",
        "negative preference optimization, by length, without the base",
        "excise.recipes.unlearning.space:READY",
    ),
    "jensun": Recipe(
        "excise.recipes.unlearning.jensun",
        "JensunSettings",
        "learn a refusal in place of answers, by a loss that has a bound",
        "excise.recipes.unlearning.space:READY",
    ),
    "tar": Recipe(
        "excise.recipes.unlearning.tar",
        "TarSettings",
        "raise the entropy on the concept where attackers arrive",
        "excise.recipes.unlearning.space:READY",
    ),
    "distill": Recipe(
        "excise.recipes.distill.recipe",
        "DistillSettings",
        "distil an edited model into a damaged copy, so that less comes back",
        "excise.recipes.distill.space:READY",
    ),
    "repselect": Recipe(
        "excise.recipes.repselect.recipe",
        "RepselectSettings",
        "step up the loss along what only the concept shares, at a KL budget",
        "excise.recipes.repselect.space:READY",
    ),
}
