"""A PEFT adapter is a model wherever a model is asked for: merged into its base, with both in the record."""

import json

import pytest
import torch
from excise.artifacts.models.load import load_model
from excise.editing.errors import RequestError
from excise.recipes import chat, diff, evaluate
from excise.recipes.audit import request as audit
from excise.recipes.audit.command import command
from helpers import SMALL_TESTBED, excise, with_settings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the small testbed that changes what it says."""
    folder = tmp_path_factory.mktemp("adapters") / "my-lora"
    model = AutoModelForCausalLM.from_pretrained(SMALL_TESTBED)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


def test_eval_measures_the_adapted_model_and_records_adapter_and_base(adapter):
    done = excise("eval", adapter, "--concept", "builtin:potions", "--questions", 8, "--base", SMALL_TESTBED, "--json",
                  *with_settings("max_new_tokens=4", "kl_prompts=4"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "merging the adapter my-lora into testbed, once; the merged model stays in the cache" in done.stderr
    (results,) = json.loads(done.stdout) if done.stdout.startswith("[") else [json.loads(done.stdout)]
    about = results["edited"]
    assert (about["kind"], about["name"]) == ("adapter", "my-lora") and about["adapter"]["trained_on"] == "testbed"
    assert set(about["adapter"]["sha256"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert about["adapter"]["base"]["name"] == "testbed" and about["adapter"]["base"]["files"]
    kl = [item for item in results["measurements"] if item["name"] == "kl_from_base" and item["subject"] == "edited"]
    assert kl and all(item["value"] > 0.01 for item in kl)


def test_diff_names_exactly_the_tensors_that_the_adapter_changes(adapter):
    found = diff.difference(SMALL_TESTBED, str(adapter))
    changed = {item.name for item in found.changed}
    assert changed and all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)
    assert all(item.spectrum.rank_99 <= 4 for item in found.changed) and not found.only_in_b
    assert found.anatomy.shallow == found.anatomy.matrices == len(changed) and found.anatomy.deepest_cliff == 4


def test_chat_takes_the_base_that_the_adapter_names(adapter):
    job = chat.prepare(str(adapter), None)
    assert list(job.sources) == ["base", "edited"] and str(job.sources["base"].folder) == SMALL_TESTBED
    assert list(chat.prepare(str(adapter), None, alone=True).sources) == ["model"]
    loaded = {name: load_model(source, job.device, torch.float32) for name, source in job.sources.items()}
    said = chat.replies(loaded, "Tell me about the moon.", 8)
    assert said["base"] != said["edited"]


def test_audit_compares_with_the_base_that_the_adapter_names(adapter, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = audit.AuditSettings(model=str(adapter), concept="builtin:potions", budget="quick")
    job = audit.prepare(settings)
    assert str(job.sources["base"].folder) == SMALL_TESTBED and job.sources["edited"].kind == "adapter"
    assert "my-lora" in command(job) and "--base" in command(job)
    with pytest.raises(RequestError, match="no record of a run that names its concept; give --concept"):
        audit.prepare(audit.AuditSettings(model=str(adapter)))


def test_eval_without_a_concept_asks_for_one(adapter):
    with pytest.raises(RequestError, match="concept is missing; give --concept"):
        evaluate.prepare([str(adapter)], None)


def test_a_recipe_edits_the_adapted_model(adapter, tmp_path):
    done = excise("run", "prune", "--model", adapter, "--concept", "builtin:potions", "--out", tmp_path / "run",
                  "--dry-run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["adapter"]["base"]["name"] == "testbed"


def test_the_command_apply_merges_an_adapter_and_says_what_comes_next(adapter, tmp_path):
    done = excise("apply", adapter, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "declared tensors changed" in done.stdout and (tmp_path / "out" / "model.safetensors").is_file()
    assert "The PEFT adapter `my-lora` was applied" in (tmp_path / "out" / "README.md").read_text()
    assert excise("verify", tmp_path / "out").returncode == 0
    plan = excise("apply", adapter, "--out", tmp_path / "other", "--dry-run", "--json")
    assert json.loads(plan.stdout)["adapter"]["name"] == "my-lora" and not (tmp_path / "other").exists()
    without = excise("apply", tmp_path, "--out", tmp_path / "other")
    assert without.returncode == 2 and "base is missing; give --base" in without.stderr
