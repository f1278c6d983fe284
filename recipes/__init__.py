"""Whole runs: each recipe reads from top to bottom."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One line of the table; the module is imported when the recipe runs."""

    module: str
    settings: str
    about: str


RECIPES: dict[str, Recipe] = {
    "orthogonalize": Recipe(
        "excise.recipes.orthogonalize", "OrthogonalizeSettings", "take a direction out of every weight that writes it"
    ),
}
