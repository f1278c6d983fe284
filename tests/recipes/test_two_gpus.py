"""Whole runs on a model that lies on two pretended GPUs learn the edit that they learn on the processor."""

import importlib
from contextlib import nullcontext

import pytest
import torch
from excise.artifacts.events import Events
from excise.artifacts.models import load
from excise.editing.architectures import ARCHITECTURES
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach
from excise.editing.training.soft_targets import keep_top
from excise.recipes import RECIPES
from excise.recipes.common.settings import load_settings
from excise.recipes.elm.batches import TERMS, TrainingSequence, collate, sequence_loss
from helpers import SMALL_TESTBED, make_pico
from pretended import on_gpu, on_two_gpus, pretended_gpus
from safetensors.torch import load_file
from torch.utils._python_dispatch import _disable_current_modes

SMALL = ("questions=4", "kl_prompts=2", "max_new_tokens=4", f"model={SMALL_TESTBED}")
RUNS = {
    "grad_diff": ("steps=2", "batch_size=4"),
    "elm": ("steps=2", "batch_size=2", "max_contexts=8", "reference_subjects=2", "contexts=texts", "fluency_tokens=2"),
}


def _learned(name, out, machine):
    recipe = RECIPES[name]
    module = importlib.import_module(recipe.module)
    job = module.prepare(load_settings(getattr(module, recipe.settings), None, [*SMALL, *RUNS[name]], {"out": out}))
    with machine:
        module.run(job, Events())
    return load_file(out / "checkpoint" / "excise" / "edit.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_two_gpus_learns_the_processors_edit(name, tmp_path, monkeypatch):
    # The processor stays what it is without bfloat16, in which the two would differ by rounding.
    monkeypatch.setattr(load, "bfloat16_is_faster", lambda: False)
    expected = _learned(name, tmp_path / "processor", nullcontext())
    plain = load.load_weights

    def spread(*arguments, **options):
        # The library makes models on "meta" before it reads them, which is no GPU yet.
        with _disable_current_modes():
            model = plain(*arguments, **options)
        return on_two_gpus(model)

    monkeypatch.setattr(load, "load_weights", spread)
    # A kernel of the optimizer asks for names of devices.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    found = _learned(name, tmp_path / "gpus", pretended_gpus())
    assert expected.keys() == found.keys() and any(float(tensor.abs().max()) > 0 for tensor in expected.values())
    for key, tensor in expected.items():
        assert torch.linalg.norm(tensor - found[key]) <= 1e-2 * torch.linalg.norm(tensor), key


def _loss_and_gradients(place, batch):
    model = place(make_pico("llama"))
    # On the second GPU alone, while the terms of the loss are on the first.
    adapted = attach(model, AdapterShape(2, 4.0, adapter_modules(model, ARCHITECTURES["llama"], [1])), seed=0)
    terms = sequence_loss(dict.fromkeys(TERMS, 1.0))(adapted, batch)
    torch.stack(list(terms.values())).sum().backward()
    gradients = [p.grad.cpu() for p in adapted.parameters() if p.requires_grad]
    return [value.detach().cpu() for value in terms.values()], gradients


def test_parts_of_a_step_add_up_where_the_adapter_is_on_another_gpu_than_the_loss():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 7, 9):
        log_p = torch.randn(length - 1, 96, generator=generator).log_softmax(-1)
        ids = tuple(torch.randint(3, 96, (length,), generator=generator).tolist())
        rows.append([TrainingSequence(ids, keep_top(log_p, 20), torch.ones(length - 1), torch.arange(length - 1) % 3)])
    batch = collate(rows, 1)
    assert len(batch["parts"]) == 3
    expected = _loss_and_gradients(lambda model: model, batch)
    with pretended_gpus():
        found = _loss_and_gradients(on_two_gpus, on_gpu(batch))
    assert sum(float(gradient.norm()) for gradient in expected[1]) > 1e-3
    for before, after in zip(expected, found, strict=True):
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after, strict=True))
