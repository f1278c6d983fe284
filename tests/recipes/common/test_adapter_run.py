"""Whole runs that train an adapter: what the merged checkpoint is compared with."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from excise.artifacts.events import Events
from excise.artifacts.models.load import load_model
from excise.editing.edits.fake_quantization import linear_weights, round_to_nearest
from excise.editing.errors import EditError
from excise.recipes.common import adapter_run
from excise.recipes.unlearning import recipe
from excise.recipes.unlearning.grad_diff import GradDiffSettings
from helpers import SMALL_TESTBED, make_pico


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


@pytest.mark.parametrize(
    ("name", "told"), [("gpt_oss", "The experts of 2 layers are stored as one tensor each"), ("llama", "")]
)
def test_a_run_says_that_fused_experts_carry_no_adapter(tmp_path, name, told):
    folder = tmp_path / name
    make_pico(name).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(SMALL_TESTBED) / file, folder)
    job = recipe.prepare(GradDiffSettings(model=str(folder), concept="builtin:potions", out=tmp_path / "run"))
    assert any(told in warning for warning in job.adapter.warnings) if told else not job.adapter.warnings
