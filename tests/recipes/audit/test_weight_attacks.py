"""Attacks on weights reach all that an edit can change: embeddings, norms, biases, experts."""

import copy
from types import SimpleNamespace

import pytest
import torch
from excise.editing.architectures import architecture_of
from excise.editing.edits import fake_quantization
from excise.editing.edits.fake_quantization import changed_weights
from excise.editing.errors import EditError
from excise.editing.hooks.residual_stream import read_streams, skipped
from excise.recipes.audit.attacks.fine_tuning import all_weights
from excise.recipes.audit.attacks.weights import (
    _own,
    _without_cliff,
    _without_largest,
    _without_smallest,
    base_parameters,
)
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


def test_a_change_is_taken_out_up_to_its_cliff_and_one_without_a_cliff_stays():
    generator = torch.Generator().manual_seed(0)
    rank_5 = torch.randn(40, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    noise = 1e-3 * torch.randn(40, 40, generator=generator)
    left = _without_cliff(rank_5 + noise)
    assert left.norm() < 2 * noise.norm() < 0.01 * rank_5.norm()
    # The strongest two directions alone would leave most of it.
    assert _without_largest(rank_5 + noise).norm() > 0.3 * rank_5.norm()
    full = torch.randn(40, 40, generator=generator)
    torch.testing.assert_close(_without_cliff(full), full)
    together = torch.stack([rank_5, full, torch.zeros(40, 40)])
    by_expert = _without_cliff(together)
    assert by_expert[0].abs().max() < 1e-4 and by_expert[2].abs().max() == 0
    torch.testing.assert_close(by_expert[1], full)
    assert torch.equal(_without_cliff(torch.ones(5)), torch.ones(5))


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_smallest_weights_are_pruned_and_no_others(share):
    weight = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    pruned = _without_smallest(share)("w", weight)
    gone = pruned == 0
    assert int(gone.sum()) == int(share * 80) and torch.equal(pruned[~gone], weight[~gone])
    assert weight[gone].abs().max() < weight[~gone].abs().min() and not (weight == 0).any()


@pytest.mark.parametrize(("name", "elsewhere"), [("llama", 0), ("mixtral", 6)])
def test_weights_are_restored_from_the_checkpoint_and_memory_holds_one_at_a_time(
    name, elsewhere, save_pico, monkeypatch
):
    """What the checkpoint does not hold bit for bit is copied, and restored too."""
    folder, model = save_pico(name).folder, make_pico(name)
    own = dict(model.named_parameters())
    with torch.no_grad():
        own[next(iter(own))] += 0.5
    before = {key: value.detach().clone() for key, value in own.items()}
    copied = []
    restored = fake_quantization.restore
    monkeypatch.setattr(fake_quantization, "restore", lambda to, old: (copied.append(len(old)), restored(to, old)))
    data = SimpleNamespace(own=folder)
    with _own(data) as stored, changed_weights(model, lambda _, weight: weight + 1, own, stored) as changed:
        assert changed == len(own) and not torch.equal(own[next(iter(own))], before[next(iter(own))])
    assert all(torch.equal(value, before[key]) for key, value in own.items())
    # The first restores copies: the changed weight, and experts with their routers, which the checkpoint holds
    # otherwise.
    assert copied[0] == 1 + elsewhere and set(copied[1:]) == {1}
    copied.clear()
    with changed_weights(model, lambda _, weight: weight + 1, own):
        pass
    assert copied == [len(own)]


def test_a_checkpoint_that_changed_meanwhile_is_noticed(save_pico):
    model = make_pico("llama")
    own = dict(model.named_parameters())
    current = {key: value.detach().clone() for key, value in own.items()}
    with pytest.raises(EditError, match="no longer what it was on disk"):
        with changed_weights(model, lambda _, weight: weight + 1, own, lambda key: current[key]):
            current[next(iter(own))] = torch.zeros_like(current[next(iter(own))])


def test_a_skipped_layer_passes_its_input_on():
    model, ids = make_pico("llama"), torch.tensor([[5, 9, 7, 3]])
    row, inputs = architecture_of(model.config.to_dict()), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        whole = read_streams(model, row, inputs, [0, 1, 2])
        with skipped(model, row, 0):
            without = read_streams(model, row, inputs, [0, 1, 2])
        again = read_streams(model, row, inputs, [2])
    assert torch.equal(without[1], whole[0]) and not torch.equal(whole[1], whole[0])
    assert not torch.equal(without[2], whole[2]) and torch.equal(again[2], whole[2])


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
