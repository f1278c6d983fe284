"""Every recipe tells what it did; one that has nothing to say is told for."""

import importlib

import pytest
from excise.artifacts.reporting.sections import Story
from excise.recipes import RECIPES
from excise.recipes.common.story import tell

RESULTS = {
    "run": {"recipe": "unheard_of"},
    "base": {"name": "base"},
    "concept": {"description": "potions"},
    "edited": {"tensors_changed": 3, "tensors_declared": 4, "rank": 8, "about": "on 4 modules"},
    "training": {"about": "Toward silence.", "steps": 5, "rows": 6, "data": "7 sequences"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_story(recipe):
    assert callable(importlib.import_module(RECIPES[recipe].module).story)


def test_a_recipe_without_a_story_still_says_how_it_was_trained():
    told = tell(RESULTS)
    assert "3 of 4 tensors changed; rank 8" in told.headline and told.limits and not told.tags
    assert told.sections[0].paragraphs[0] == "Toward silence. 5 steps of 6 sequences; 7 sequences."
    untrained = {key: value for key, value in RESULTS.items() if key != "training"}
    assert tell(untrained) == Story()


def test_unlearning_methods_are_tagged_as_such():
    assert "unlearning" in tell({**RESULTS, "run": {"recipe": "npo"}}).tags
