"""Budgets: what each sets, that explicit settings win, and that a quick run says what it is."""

import importlib

import pytest
from excise.artifacts.reporting.findings import _quick
from excise.recipes import RECIPES
from excise.recipes.commands.session import after_run
from excise.recipes.common.budgets import MEASURED
from excise.recipes.common.settings import load_settings
from helpers import SMALL_TESTBED, excise, run_once, with_settings

SMALLER = {"steps", "batch_size", "max_contexts", "chat_facts", "examples", "validate_units", "train_pairs", "watch"}


def _kind(recipe):
    return getattr(importlib.import_module(RECIPES[recipe].module), RECIPES[recipe].settings)


@pytest.mark.parametrize("recipe", RECIPES)
def test_quick_is_less_and_long_is_more_of_what_a_recipe_spends(recipe):
    kind = _kind(recipe)
    more = {key: "x" for key, field in kind.model_fields.items() if field.is_required()}
    standard = kind(**more)
    assert (
        standard.budget == "standard" and standard == kind(budget="standard", **more) and not standard.set_by_budget()
    )
    for budget, less in (("quick", True), ("long", False)):
        values = kind.set_by(budget)
        assert values.keys() > MEASURED[budget].keys(), "the recipe sets something of its own"
        chosen = kind(budget=budget, **more)
        assert chosen.set_by_budget() == values == {key: getattr(chosen, key) for key in values}
        for key in values.keys() & SMALLER:
            assert values[key] != getattr(standard, key) and (values[key] < getattr(standard, key)) == less


def test_settings_that_are_given_win_over_the_budget_and_over_a_preset():
    chosen = load_settings(_kind("elm"), None, ["steps=7", "preset=paper"], {"budget": "quick", "max_new_tokens": 5})
    assert (chosen.steps, chosen.max_new_tokens, chosen.rank) == (7, 5, 4)
    assert (chosen.batch_size, chosen.max_contexts, chosen.questions) == (4, 240, 60)


def test_the_command_that_takes_more_time_keeps_what_was_asked_for():
    words = ["after=runs/elm-1", "kl_budget=0.1", "texts=40", "layers=4-7"]
    chosen = load_settings(
        _kind("repselect"), None, words, {"budget": "quick", "model": "m", "concept": "c", "out": "o"}
    )
    results = {"base": {"kind": "local", "name": "m"}, "run": {"recipe": "repselect"}}
    (again,) = [command for command in after_run(chosen, results) if "--budget standard" in command]
    assert again.startswith("excise run repselect --model m --concept c --budget standard ")
    given = again.partition("standard ")[2]
    assert sorted(given.split("--set ")[1:]) == ["after=runs/elm-1 ", "kl_budget=0.1 ", "layers=4-7 ", "texts=40"]
    plain = load_settings(_kind("repselect"), None, [], {"budget": "quick", "model": "m", "concept": "c", "out": "o"})
    assert after_run(plain, results)[1].endswith("--budget standard")


def test_a_wrong_budget_is_one_line():
    done = excise("run", "elm", "--budget", "quik", "--dry-run")
    assert done.returncode == 2 and "did you mean" in done.stderr and "allowed: quick, standard, long" in done.stderr


def test_a_quick_run_is_said_to_be_one_and_the_card_has_its_values():
    small = with_settings("kl_prompts=4", "max_new_tokens=6", "validation_pairs=8")
    out, results = run_once("orthogonalize", "--model", SMALL_TESTBED, "--budget", "quick", *small)
    assert results["run"]["budget"]["name"] == results["run"]["settings"]["budget"] == "quick"
    assert results["run"]["budget"]["set"] == {
        "questions": 60,
        "max_new_tokens": 6,
        "kl_prompts": 4,
        "train_pairs": 64,
        "validation_pairs": 8,
        "positions": 2,
    }
    card = (out / "checkpoint" / "README.md").read_text()
    assert "This was a quick run (questions 60, max_new_tokens 6, kl_prompts 4, train_pairs 64" in card
    assert "--set budget=quick" in card
    assert _quick({"budget": {"name": "standard", "set": {}}}) == _quick({}) == ""
