"""A step after another edit: what the chain of two runs gives, as one edit of the base, told as one."""

import json
import shutil

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.editing.errors import RequestError
from excise.recipes.repselect.recipe import RepselectSettings, describe, learn, memory, prepare
from helpers import SMALL_TESTBED, excise, with_settings
from safetensors.torch import load_file, save_file

QUICK = ("texts=24", "questions=10", "kl_prompts=8", "max_new_tokens=2", "controls=false")
WORDS = ("--dtype", "float32", "--kl-budget", 0.02, "--json", *with_settings(*QUICK))


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The small model, edited: low-rank updates of its matrices of half the layers, a norm, and the embeddings."""
    folder = tmp_path_factory.mktemp("before") / "edited"
    shutil.copytree(SMALL_TESTBED, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if "layers.0." in name or "layers.1." in name or "embed" in name:
            left, right = (torch.randn(size, 2, generator=generator) for size in (weight.shape[0], weight.shape[-1]))
            added = 0.02 * (left @ right.T if weight.ndim == 2 else left[:, 0])
            tensors[name] = (weight.float() + added).to(weight.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _run(out, *words):
    done = excise("run", "repselect", "--concept", "builtin:potions", "--out", out, *words, *WORDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), load_file(out / "checkpoint" / "model.safetensors")


def test_both_edits_are_one_of_the_base_and_equal_the_chain_of_two_runs(before, tmp_path):
    chained, wanted = _run(tmp_path / "chained", "--model", before)
    told, found = _run(tmp_path / "after", "--model", SMALL_TESTBED, "--set", f"after={before}")
    base, edited = load_file(f"{SMALL_TESTBED}/model.safetensors"), load_file(before / "model.safetensors")
    assert told["kl_budget"]["strength"] == chained["kl_budget"]["strength"]
    for name, weight in wanted.items():
        # One sum in place of two: the last bit of a stored number may be another one.
        assert torch.allclose(found[name].float(), weight.float(), rtol=2**-7, atol=0), name
    same = sum(int((found[name] == weight).sum()) for name, weight in wanted.items())
    assert same > 0.999 * sum(weight.numel() for weight in wanted.values())
    # Unlike the step alone: what the edit before changed is in the edit, with the norm and the embeddings.
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert {name for name in base if not torch.equal(base[name], edited[name])} < changed
    assert told["edited"]["tensors_changed"] == len(changed) > chained["edited"]["tensors_changed"]
    # Measured against the base that the first edit was made from, and the step's control is that edit.
    answers = {
        run: {(one["split"], one["subject"]): one["value"] for one in results["measurements"]
              if one["name"] == "multiple_choice"}
        for run, results in (("chained", chained), ("after", told))
    }  # fmt: skip
    of_first = told["repselect"]["after"]["accuracies"]
    for split in ("forget_T", "forget_V", "neighbour", "retain"):
        assert answers["chained"][split, "base"] == of_first[split]["value"]
        assert answers["chained"][split, "edited"] == answers["after"][split, "edited"]
    assert answers["after"]["forget_V", "base"] > answers["chained"]["forget_V", "base"]
    card = (tmp_path / "after/checkpoint/README.md").read_text()
    assert "`edited`, an edit of" in card and "| the edit before the step |" in card
    assert "KL(model before the step || edited)" in card and str(before.parent) not in card
    assert load_edit(tmp_path / "after").provenance["kl_budget"]["of"] == "model before the step"
    assert excise("verify", tmp_path / "after").returncode == 0


def test_mending_keeps_what_the_edit_before_changed_beside_the_weights_that_it_trains(before, tmp_path):
    told, found = _run(tmp_path / "mended", "--model", SMALL_TESTBED, "--set", f"after={before}", "--set", "mend=2")
    base, edited = load_file(f"{SMALL_TESTBED}/model.safetensors"), load_file(before / "model.safetensors")
    untrained = {name for name in base if "norm" in name or "embed" in name}
    moved = {name for name in untrained if not torch.equal(base[name], edited[name])}
    assert len(moved) >= 3
    for name in untrained:
        assert torch.allclose(found[name].float(), edited[name].float(), rtol=2**-7, atol=0), name
    assert all(not torch.equal(found[name], base[name]) for name in base if "proj" in name)
    about = told["repselect"]
    assert about["mended"]["steps"] == 2 and about["after"]["name"] == "edited"
    # Before it was mended the model was farther from the base than the budget of the step alone says.
    assert about["mended"]["before"]["kl"] > told["kl_budget"]["kl"]


def test_base_and_concept_come_from_the_run_before(tmp_path):
    first = tmp_path / "first"
    words = with_settings("steps=1", "questions=2", "kl_prompts=2", "max_new_tokens=1")
    done = excise("run", "grad_diff", "--model", "builtin:testbed", "--out", first, *words)
    assert done.returncode == 0, done.stderr
    settings = RepselectSettings(after=str(first)).completed()
    assert (settings.model, settings.concept) == ("builtin:testbed", "builtin:potions")
    assert RepselectSettings(after=str(first), model=SMALL_TESTBED).completed().model == SMALL_TESTBED
    done = excise("run", "repselect", "--set", f"after={first}", "--dry-run", "--json", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["after"] == "first/checkpoint"


def _job(tmp_path, **settings):
    chosen = {"model": SMALL_TESTBED, "concept": "builtin:potions", "out": tmp_path / "run", "device": "cpu"}
    return prepare(RepselectSettings(**{**chosen, "dtype": "float32", "texts": 4, "controls": False, **settings}))


@pytest.mark.parametrize(("after", "said"), [
    ("nowhere/", "nowhere/ is no model folder"),
    ("builtin:testbed", "tensors, such as model.embed_tokens.weight, are in one alone"),
])  # fmt: skip
def test_what_is_no_edit_of_the_base_is_refused_before_any_weight_is_read(tmp_path, after, said):
    with pytest.raises(RequestError, match=said) as caught:
        _job(tmp_path, after=after)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_the_base_is_no_edit_and_a_search_has_no_strength_to_turn(tmp_path, before):
    done = excise("run", "repselect", "--concept", "builtin:potions", "--model", SMALL_TESTBED, "--out", tmp_path / "a",
                  "--set", f"after={SMALL_TESTBED}", *WORDS)  # fmt: skip
    assert done.returncode != 0 and "has the weights of the base" in done.stderr
    job = _job(tmp_path, after=str(before))
    loaded = load_model(job.adapter.run.source, torch.device("cpu"), torch.float32)
    with pytest.raises(RequestError, match="only the step has one"):
        learn(job, loaded, Events(), tmp_path, {})


def test_a_plan_counts_both_models(tmp_path, before):
    alone, beside = _job(tmp_path), _job(tmp_path, after=str(before))
    assert "after" not in describe(alone) and describe(beside)["after"]
    one, two = ({stage.name: stage.weights for stage in memory(job).stages} for job in (alone, beside))
    for name in ("sum gradients", "choose the strength"):
        assert two[name] == 2 * one[name]
