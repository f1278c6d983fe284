"""Plans read the sequences that a run will read: the largest step that is planned is the largest that is computed."""

import importlib

import pytest
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.recipes import RECIPES
from excise.recipes.common import adapter_run
from excise.recipes.common.memory_plan import RunMemory
from excise.recipes.common.memory_sizes import Rows
from excise.recipes.common.settings import load_settings
from excise.recipes.elm.batches import SequenceObjective
from helpers import SMALL_TESTBED

SMALL = {"questions": 4, "kl_prompts": 2, "max_new_tokens": 3, "steps": 6, "batch_size": 3}
EXACT = {
    "npo": {},
    "caft": {"concept": "builtin:shortcut", "directions": "none", "controls": False},
    "lorra": {"concept": "builtin:declining"},
}
DRAWN = {
    "elm": {"max_contexts": 24, "chat_facts": 2, "contrast": "subjects", "strength": 1.0},
    "distill": {"teacher": "builtin:testbed-reference", "model": "builtin:testbed", "samples": 0},
}


def _learned(recipe, tmp_path, **settings):
    """Learn an edit, and the job that it was learned by."""
    module = importlib.import_module(RECIPES[recipe].module)
    words = {"model": SMALL_TESTBED, "out": tmp_path / "run", "device": "cpu", "dtype": "float32"} | SMALL | settings
    job = module.prepare(load_settings(getattr(module, RECIPES[recipe].settings), None, [], words))
    run = job.adapter.run
    module.learn(job, load_model(run.source, run.device, run.dtype), Events(), tmp_path, {})
    return module, job


def _planned(module, job, monkeypatch):
    """Rows of the step that is planned."""
    seen, plan = [], RunMemory.training

    def training(needs, adapter, rows, **rest):
        seen.append(rows)
        return plan(needs, adapter, rows, **rest)

    monkeypatch.setattr(RunMemory, "training", training)
    module.memory(job)
    return seen[0]


@pytest.mark.parametrize("recipe", EXACT)
def test_the_largest_step_that_is_planned_is_the_largest_that_is_computed(recipe, tmp_path, monkeypatch):
    seen, planned = [], adapter_run.step_in_parts

    def noted(job, rows, deepest=None):
        seen.append(rows)
        return planned(job, rows, deepest)

    monkeypatch.setattr(adapter_run, "step_in_parts", noted)
    module, job = _learned(recipe, tmp_path, **EXACT[recipe])
    expected = _planned(module, job, monkeypatch)
    if recipe == "lorra":
        # Replies may be shorter than they can be.
        assert expected.count == seen[0].count and seen[0].length <= expected.length <= seen[0].length + 24
    else:
        assert expected == seen[0]


@pytest.mark.parametrize("recipe", DRAWN)
def test_where_models_write_what_is_read_the_plan_is_near_and_hardly_below(recipe, tmp_path, monkeypatch):
    tokens, collate = [], SequenceObjective.collate

    def counted(training, rows):
        batch = collate(training, rows)
        tokens.extend(part["input_ids"].numel() for part in batch["parts"])
        return batch

    monkeypatch.setattr(SequenceObjective, "collate", counted)
    module, job = _learned(recipe, tmp_path, **DRAWN[recipe])
    planned = _planned(module, job, monkeypatch)
    assert isinstance(planned, Rows) and 0.85 < planned.tokens / max(tokens) < 1.6
