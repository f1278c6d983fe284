"""Adapters on the Hub: taken by id, with their base, both pinned to their commits."""

import json

import pytest
import torch
from helpers import excise, make_pico
from loopback_hub import client, folder_files
from loopback_hub import hub as running_hub
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ADAPTER, BASE = "tester/lora", "tester/base"


@pytest.fixture
def world(tmp_path):
    """A Hub with a base and an adapter of it."""
    make_pico("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": BASE}))
    with running_hub() as known:
        known.add(BASE, folder_files(tmp_path / "base"))
        known.add(ADAPTER, folder_files(tmp_path / "lora"))
        yield known, client(known, tmp_path / "hf")


def test_an_adapter_is_applied_by_its_id_and_both_commits_are_recorded(world, tmp_path):
    _, environment = world
    done = excise("apply", ADAPTER, "--out", tmp_path / "out", **environment)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/excise/manifest.json").read_text())
    adapter = manifest["run"]["adapter"]
    assert (adapter["name"], adapter["trained_on"], manifest["base"]["name"]) == (ADAPTER, BASE, BASE)
    assert len(adapter["revision"]) == len(manifest["base"]["revision"]) == 40
    assert adapter["revision"] != manifest["base"]["revision"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all((made[name] - tensor).abs().max() < 1e-6 for name, tensor in expected.items())
    assert f"The PEFT adapter `{ADAPTER}` at `{adapter['revision']}`" in (tmp_path / "out/README.md").read_text()


def test_an_adapter_and_its_base_are_compared_by_their_ids(world):
    _, environment = world
    done = excise("diff", BASE, ADAPTER, "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert {item["name"] for item in json.loads(done.stdout)["changed"]} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }


def test_an_adapter_is_not_pulled_as_a_model(world, tmp_path):
    _, environment = world
    done = excise("pull", ADAPTER, "--out", tmp_path / "model", **environment)
    assert done.returncode == 2 and "tester/lora is a PEFT adapter, not a whole model" in done.stderr
    assert not (tmp_path / "model").exists()
