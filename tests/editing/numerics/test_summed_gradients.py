"""Summed gradients against autograd over everything at once, in float64."""

import copy

import pytest
import torch
from excise.editing.numerics.summed_gradients import summed_gradients
from helpers import make_pico

ROWS = torch.randint(3, 96, (4, 3, 7), generator=torch.Generator().manual_seed(0))
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight")


def _loss(model, rows):
    return model(input_ids=rows, labels=rows).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_all_batches_and_everything_else_stays_as_it_was(dtype):
    model = make_pico("llama").to(dtype)
    model.lm_head.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    double = copy.deepcopy(model).double().requires_grad_(True)
    sum(_loss(double, rows) for rows in ROWS).backward()
    with summed_gradients(model, {name: model.get_parameter(name) for name in NAMES}) as sums:
        for rows in ROWS:
            _loss(model, rows).backward()
            assert all(parameter.grad is None for parameter in model.parameters())
    for name in NAMES:
        wanted, found = double.get_parameter(name).grad, sums[name]
        assert found.dtype == torch.float32 and wanted.norm() > 0
        assert (found.double() - wanted).norm() < {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype] * wanted.norm()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    _loss(model, ROWS[0]).backward()
    assert model.get_parameter(NAMES[0]).grad is not None, "later backwards are nobody's business"
