"""Fine-tunes of whole weights are edits like any other."""

import json

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.editing.architectures import ARCHITECTURES, layer_count, residual_width
from excise.editing.edits.base import edit_model
from excise.editing.edits.dense import DenseUpdate, learned_deltas, weights_trained
from excise.editing.errors import EditError, RequestError
from excise.editing.training.adapters import adapter_modules
from excise.recipes.caft.recipe import CaftSettings, prepare
from excise.recipes.common import whole_weights
from helpers import SMALL_TESTBED, excise, make_pico, with_settings

INPUTS = {"input_ids": torch.tensor([[5, 9, 7, 3, 11]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def _tuned(name, dtype=torch.float32, rate=0.05):
    """A model, its modules, what two steps of plain gradient descent taught it, and what it then says."""
    model = make_pico(name, dtype)
    modules = adapter_modules(model, ARCHITECTURES[name], range(2))
    with weights_trained(model, modules) as before:
        for _ in range(2):
            model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= rate * parameter.grad
                        parameter.grad = None
        deltas, said = learned_deltas(model, before), model(**INPUTS).logits.detach()
    config = model.config.to_dict()
    return model, DenseUpdate(deltas, config["model_type"], residual_width(config), layer_count(config)), said


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_learned_is_an_edit_that_makes_the_fine_tune_again(name, tmp_path):
    _, update, said = _tuned(name)
    save_edit(update, tmp_path)
    found = load_edit(tmp_path)
    assert found.deltas.keys() == update.deltas.keys() and found.provenance == {}
    plain = make_pico(name)
    before = plain(**INPUTS).logits.detach()
    edit_model(found, plain, plain.config.to_dict())
    assert torch.allclose(plain(**INPUTS).logits, said, atol=1e-5)
    assert (before - said).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_afterwards_the_model_is_what_it_was(dtype):
    model, _, _ = _tuned("llama", dtype)
    base = dict(make_pico("llama", dtype).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, base[name]) and parameter.requires_grad and parameter.grad is None, name
        assert parameter.dtype == dtype


def test_only_the_named_weights_are_trained_and_in_full_precision():
    model = make_pico("llama", torch.bfloat16)
    with weights_trained(model, ["model.layers.1.mlp.down_proj"]) as before:
        assert list(before) == ["model.layers.1.mlp.down_proj.weight"]
        wanting = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert wanting == list(before)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_training_that_learned_nothing_is_an_error_when_applied():
    _, update, _ = _tuned("llama", rate=0.0)
    plain = make_pico("llama")
    with pytest.raises(EditError, match="changed none of its"):
        edit_model(update, plain, plain.config.to_dict())


def test_without_memory_for_whole_weights_the_request_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(whole_weights, "free_memory", lambda device: 10**6)
    with pytest.raises(RequestError, match="use tune=lora"):
        prepare(CaftSettings(tune="full", out=tmp_path / "run"))
    assert prepare(CaftSettings(out=tmp_path / "run")).settings.learning_rate == 1e-3


def test_concepts_are_ablated_in_full_fine_tuning_too(tmp_path):
    words = ("tune=full", "steps=60", "learning_rate=0.0005", "kl_prompts=4", "controls=false", "ablated_layers=0-1")
    done = excise("run", "caft", "--model", SMALL_TESTBED, "--out", tmp_path / "run", "--json", *with_settings(*words))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    right = {
        m["split"]: m["value"]
        for m in results["measurements"]
        if (m["subject"], m["name"]) == ("edited", "multiple_choice")
    }
    assert right["flipped"] > 0.8 and right["intended"] > 0.9
    # Embeddings are not trained, so the cue stays where it was found; one layer up it may move, and is seen to.
    during = results["caft"]["during"]
    assert [seen["step"] for seen in during] == [1, 2, 4, 8, 16, 32, 60]
    assert all(seen["found_again"]["input of layer 0"] > 0.999 for seen in during)
    assert during[-1]["found_again"]["input of layer 1"] < during[0]["found_again"]["input of layer 1"] - 0.02
    assert results["edited"]["tensors_declared"] == 28 and "rank" not in results["edited"]
    checkpoint = tmp_path / "run" / "checkpoint"
    assert not (checkpoint / "adapter").exists() and "whole weights" in (checkpoint / "README.md").read_text()
    assert excise("verify", checkpoint).returncode == 0
