"""Plans read the sequences that a run will read: the largest step that is planned is the largest that is computed."""

import importlib

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.numerics.live_bytes import LiveBytes
from excise.eval.inference.likelihood import batch_budget
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from excise.recipes import RECIPES
from excise.recipes.audit import recipe as audit
from excise.recipes.common import adapter_run
from excise.recipes.common.measured_memory import choosing_bytes
from excise.recipes.common.memory_plan import RunMemory
from excise.recipes.common.memory_sizes import Rows, sizes_of
from excise.recipes.common.settings import load_settings
from excise.recipes.elm.batches import SequenceObjective
from helpers import SMALL_REFERENCE, SMALL_TESTBED

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


@pytest.mark.parametrize("every", [False, True])
def test_questions_with_choices_take_what_real_tensors_take(every):
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    chosen = load_concept("builtin:potions").questions[:40]
    # Of two lengths, so that there are batches of few and of many prompts.
    questions = MultipleChoiceSet(
        loaded.tokenizer, chosen, lambda question: "The potion is old. " * (chosen.index(question) % 2)
    )
    questions.hits(loaded.model)
    with LiveBytes([*loaded.model.parameters(), *loaded.model.buffers()]) as live:
        questions.log_probabilities(loaded.model) if every else questions.hits(loaded.model)
    budget = batch_budget(loaded.model)
    planned = choosing_bytes(sizes_of(loaded.model.config.to_dict(), torch.float32), questions, budget, every=every)
    assert planned == pytest.approx(live.peak, rel=0.15)


def test_attackers_are_asked_as_they_train_beside_what_they_hold(tmp_path):
    words = {"model": SMALL_REFERENCE, "base": SMALL_TESTBED, "concept": "builtin:potions", "device": "cpu"}
    words |= {"questions": 20, "attacks": ("few_shot", "rtt"), "out": tmp_path / "audit", "dtype": "float32"}
    stages = {stage.name: stage for stage in audit.memory(audit.prepare(audit.AuditSettings(**words))).stages}
    asked, attack = stages["ask the questions"], stages["attack: low_rank"]
    assert attack.work >= asked.work > 0 and attack.total >= asked.total + attack.trained > asked.total
