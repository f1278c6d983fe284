"""Rounded weights lie on their grid, and the model gets its own back."""

import pytest
import torch
from excise.editing.edits.fake_quantization import (
    changed_weights,
    expert_weights,
    linear_weights,
    restore,
    round_to_nearest,
    rounded_weights,
)
from excise.editing.errors import EditError
from helpers import make_pico


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15)])
def test_a_group_has_no_more_values_than_its_bits_and_the_largest_is_kept(bits, levels):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, bits)
    for original, row in zip(weight.view(-1, 64), rounded.view(-1, 64), strict=True):
        assert len(row.unique()) <= levels
        torch.testing.assert_close(row.abs().max(), original.abs().max())
        step = original.abs().max() / (2 ** (bits - 1) - 1)
        assert ((row - original).abs() <= step / 2 + 1e-6).all() and (row != original).any()


def test_fewer_bits_move_weights_further():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    errors = [float((round_to_nearest(weight, bits) - weight).norm()) for bits in (16, 8, 4)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_come_back_bit_for_bit_even_after_an_error(name):
    model = make_pico(name)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), changed_weights(model, lambda _, w: round_to_nearest(w, 4)) as changed:
        assert changed == len(linear_weights(model)) > 4
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())


@pytest.mark.parametrize(("name", "inputs"), [("llama", -1), ("gpt2", 0)])
def test_groups_run_along_inputs_in_either_layout(name, inputs):
    model = make_pico(name)
    with rounded_weights(model, 4):
        weights = [weight.movedim(inputs, -1) for weight in linear_weights(model).values()]
        sizes = [64 if weight.shape[-1] % 64 == 0 else weight.shape[-1] for weight in weights]
        groups = [
            g
            for w, size in zip(weights, sizes, strict=True)
            for g in w.detach().unflatten(-1, (-1, size)).flatten(0, -2)
        ]
        assert max(len(group.unique()) for group in groups) <= 15
    crossed = [weight.detach().movedim(inputs, 0).flatten(0, -2) for weight in linear_weights(model).values()]
    assert max(len(group.unique()) for weight in crossed for group in weight) > 15


@pytest.mark.parametrize(("name", "inputs"), [("mixtral", -1), ("qwen3_moe", -1), ("gpt_oss", -2)])
def test_experts_are_rounded_too_in_groups_along_their_inputs(name, inputs):
    model = make_pico(name)
    before = {key: value.detach().clone() for key, value in expert_weights(model).items()}
    assert len(before) >= 2
    with rounded_weights(model, 4):
        for key, weight in expert_weights(model).items():
            assert not torch.equal(weight, before[key])
            rows = weight.detach().movedim(inputs, -1)
            size = 64 if rows.shape[-1] % 64 == 0 else rows.shape[-1]
            groups = rows.unflatten(-1, (-1, size)).flatten(0, -2)
            assert max(len(group.unique()) for group in groups) <= 15
    assert all(torch.equal(weight, before[key]) for key, weight in expert_weights(model).items())
    # Nearly all that is multiplied is reached.
    with rounded_weights(model, 8) as changed:
        assert changed == len(linear_weights(model)) + len(before)


def test_in_bfloat16_every_parameter_is_rounded():
    model = make_pico("gpt2")
    with rounded_weights(model, 16) as changed:
        assert changed == len(list(model.parameters()))
        assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert not all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_a_weight_that_does_not_come_back_is_an_error():
    weight = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.raises(EditError, match="w could not be restored"):
        restore(weight, {"w": torch.tensor([1.001, float("nan")])})
