"""Attacks on weights reach all that an edit can change: embeddings, norms, biases, experts."""

import copy

import pytest
import torch
from excise.editing.edits.fake_quantization import changed_weights
from excise.recipes.audit.attacks.fine_tuning import all_weights
from excise.recipes.audit.attacks.weights import _without_largest, base_parameters
from helpers import make_pico


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "opt", "gemma3_text"])
def test_half_of_the_way_to_the_base_is_half_in_every_parameter(name, save_pico, tmp_path):
    base = make_pico(name)
    folder = save_pico(name).folder
    edited = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter += 0.1
    with base_parameters(folder) as read:
        every = dict(edited.named_parameters())
        with changed_weights(edited, lambda key, weight: (read(key) + weight) / 2, every) as changed:
            assert changed == len(every)
            for key, parameter in base.named_parameters():
                torch.testing.assert_close(every[key], parameter + 0.05, atol=1e-6, rtol=0)


def test_an_update_of_low_rank_is_gone_with_its_strongest_directions_in_matrices_and_experts():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(12, 2, generator=generator) @ torch.randn(2, 9, generator=generator)
    experts = torch.randn(3, 12, 2, generator=generator) @ torch.randn(3, 2, 9, generator=generator)
    full = torch.randn(12, 9, generator=generator)
    for added in (flat, experts):
        assert _without_largest(added).abs().max() < 1e-4 < added.abs().max()
    assert _without_largest(full).abs().max() > 0.1
    bias = torch.ones(5)
    assert torch.equal(_without_largest(bias), bias)


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_training_all_weights_trains_every_parameter_and_leaves_none_changed(name):
    model = make_pico(name)
    before = copy.deepcopy(model.state_dict())
    ids = torch.tensor([[5, 9, 7, 3, 11, 8, 4]])
    with all_weights(model, [0]) as adapters:
        assert len(adapters.owned[0]) == len(list(model.parameters()))
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in adapters.owned[0]:
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        assert not torch.equal(model.get_input_embeddings().weight, next(iter(before.values())))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
