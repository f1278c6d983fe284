"""Whole runs that train an adapter: what the merged checkpoint is compared with."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from excise.artifacts.checkpoints.read import open_checkpoint, read_tensor
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model, load_tokenizer
from excise.editing.edits.fake_quantization import linear_weights, round_to_nearest
from excise.editing.errors import EditError, RequestError
from excise.recipes.caft import recipe as caft
from excise.recipes.caft.recipe import CaftSettings
from excise.recipes.common import adapter_run
from excise.recipes.unlearning import recipe
from excise.recipes.unlearning.grad_diff import GradDiffSettings
from helpers import PICO, SMALL_TESTBED
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM


def _in_4_bits(source, device, dtype, *, bits, prompts):
    """As bitsandbytes does on a GPU, a base whose weights are rounded; to 2 bits, which shows on texts that a small model is sure of."""
    assert bits == 4
    loaded = load_model(source, device, dtype, prompts=prompts)
    with torch.no_grad():
        for weight in linear_weights(loaded.model).values():
            weight.copy_(round_to_nearest(weight, 2))
    return loaded


def _job(out):
    settings = GradDiffSettings(
        model=SMALL_TESTBED, concept="builtin:potions", out=out, steps=2, questions=8, kl_prompts=2, max_new_tokens=2
    )
    job = recipe.prepare(settings)
    # Asked for from the start, it is refused where there is no GPU.
    return replace(job, adapter=replace(job.adapter, settings=settings.model_copy(update={"base_bits": 4})))


def test_a_merge_after_training_in_4_bits_is_compared_with_the_full_precision_base(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_run, "load_model", _in_4_bits)
    finished = recipe.run(_job(tmp_path / "run"), Events())
    assert finished.results["merged_kl"] < 1e-3

    # The 4-bit base with the adapter is further away than rounding of the merge explains.
    monkeypatch.setattr(adapter_run, "_predict_in_full_precision", lambda *_: None)
    with pytest.raises(EditError, match="differs from base and adapter"):
        recipe.run(_job(tmp_path / "against the 4-bit base"), Events())


def _of_experts(name, folder):
    """A random model of experts that reads the test bed's tokens, in several files."""
    tokenizer = load_tokenizer(find_model(SMALL_TESTBED))
    config = AutoConfig.for_model(name, **(PICO[name] | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SMALL_TESTBED) / file, folder)
    return str(folder)


def _settings(model, out, **options):
    few = {"steps": 2, "batch_size": 2, "questions": 4, "kl_prompts": 2, "max_new_tokens": 2, "learning_rate": 0.02}
    return GradDiffSettings(model=model, concept="builtin:potions", out=out, **(few | options))


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_a_run_trains_fused_experts_and_publishes_what_it_trained(tmp_path, name):
    model = _of_experts(name, tmp_path / name)
    job = recipe.prepare(_settings(model, tmp_path / "run"))
    assert not job.adapter.warnings and len(job.adapter.shape.experts) == 4
    finished = recipe.run(job, Events())
    assert finished.results["merged_kl"] < 1e-5
    assert "4 tensors of fused experts" in finished.results["edited"]["about"]
    base, edited = open_checkpoint(Path(model)), open_checkpoint(tmp_path / "run" / "checkpoint")
    assert len(base.shards) > 1
    experts = [name for name in base.tensors if "experts" in name and "bias" not in name]
    assert experts and not any(_same(base, edited, name) for name in experts)
    # Whoever loads the adapter with peft gets the same model; where peft would put it elsewhere, there is none.
    adapter = tmp_path / "run" / "checkpoint" / "adapter"
    assert adapter.exists() == (name != "qwen3_moe")
    if not adapter.exists():
        return
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    tokens = torch.tensor([[5, 9, 7, 3, 11]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")(tokens).logits
        assert (adapted.eval()(tokens).logits - wanted).abs().max() < 1e-4


def _same(base, edited, name):
    return torch.equal(read_tensor(base.tensors[name]), read_tensor(edited.tensors[name]))


def test_experts_that_a_run_leaves_out_are_told_and_stay(tmp_path):
    model = _of_experts("mixtral", tmp_path / "base")
    job = recipe.prepare(_settings(model, tmp_path / "run", experts=False))
    assert any("The experts of 2 layers" in told and "(experts=false)" in told for told in job.adapter.warnings)
    recipe.run(job, Events())
    base, edited = open_checkpoint(Path(model)), open_checkpoint(tmp_path / "run" / "checkpoint")
    assert all(_same(base, edited, name) == ("self_attn" not in name) for name in base.tensors)
    attention = recipe.prepare(_settings(model, tmp_path / "attention", modules="attention"))
    assert any("(modules=attention)" in told for told in attention.adapter.warnings)
    only = recipe.prepare(_settings(model, tmp_path / "only", modules="mlp")).adapter.shape
    assert not only.modules and len(only.experts) == 4
    with pytest.raises(RequestError, match="only experts that are fused"):
        recipe.prepare(_settings(model, tmp_path / "nothing", modules="mlp", experts=False))
    assert not recipe.prepare(_settings(SMALL_TESTBED, tmp_path / "dense")).adapter.warnings


def test_whole_weights_of_experts_are_trained_too(tmp_path):
    model = _of_experts("qwen3_moe", tmp_path / "base")
    settings = CaftSettings(
        model=model, out=tmp_path / "run", tune="full", directions="none", steps=2, batch_size=2, max_new_tokens=2
    )
    job = caft.prepare(settings)
    assert not job.adapter.warnings
    finished = caft.run(job, Events())
    assert finished.results["merged_kl"] < 1e-5
    base, edited = open_checkpoint(Path(model)), open_checkpoint(tmp_path / "run" / "checkpoint")
    assert not any(_same(base, edited, name) for name in base.tensors if ".experts." in name)
