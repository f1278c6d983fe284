"""A layer with a low-rank update, however it is computed, against its definition in float64."""

import pytest
import torch
from excise.editing.training import low_rank_layer
from excise.editing.training.adapters import AdapterShape, attach
from helpers import make_pico
from torch import nn

NAME = "model.layers.0.mlp.up_proj"


def _layer(dtype=torch.float32, bias=False):
    """One layer of a small model with an update that is not zero, which is what stands in the module's place."""
    model = make_pico("llama", dtype)
    inner = model.get_submodule(NAME)
    if bias:
        inner.bias = nn.Parameter(torch.randn(inner.out_features, dtype=dtype), requires_grad=False)
    layer = attach(model, AdapterShape(3, 6.0, (NAME,)), seed=0).get_base_model().get_submodule(NAME)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in (layer.lora_A["default"], layer.lora_B["default"]):
            part.weight += 0.1 * torch.randn(part.weight.shape)
    return layer


def _wanted(layer, x, upstream):
    """Output and gradients by the definition, in float64."""
    down, up = (part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    x, frozen = x.detach().double().requires_grad_(), layer.base_layer
    weight = frozen.weight.detach().double() + layer.scaling["default"] * up @ down
    out = nn.functional.linear(x, weight, None if frozen.bias is None else frozen.bias.double())
    return [out, *torch.autograd.grad(out, (x, down, up), upstream.double())]


@pytest.mark.parametrize(("positions", "sums"), [(2, False), (256, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_the_definition(positions, sums, bias):
    layer = _layer(bias=bias)
    x = torch.randn(2, positions, layer.base_layer.in_features, requires_grad=True)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert low_rank_layer.sums_first(layer.base_layer, x, down) == sums
    out = layer(x)
    upstream = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, (x, down, up), upstream)]
    for one, other in zip(found, _wanted(layer, x, upstream), strict=True):
        assert one.shape == other.shape and (one.double() - other).norm() < 1e-5 * other.norm() > 0
        # States of a training hold gradients, and files hold no other tensors.
        assert one.is_contiguous()


def test_a_sum_is_formed_only_where_it_rounds_nothing_and_nobody_looks_on():
    x = torch.randn(1, 512, 32)
    layer = _layer()
    down = layer.lora_A["default"].weight
    asked = layer.base_layer, x, down
    assert low_rank_layer.sums_first(*asked)
    with torch.autocast("cpu", torch.bfloat16):
        assert not low_rank_layer.sums_first(*asked)
    assert not low_rank_layer.sums_first(layer.base_layer, x.bfloat16(), down)
    narrow = _layer(torch.bfloat16)
    assert not low_rank_layer.sums_first(narrow.base_layer, x.bfloat16(), narrow.lora_A["default"].weight)
    # A hook sees what the frozen layer alone says, and ablations change it.
    with layer.base_layer.register_forward_hook(lambda *_: None):
        assert not low_rank_layer.sums_first(*asked)
    layer.base_layer.weight.requires_grad_(True)
    assert not low_rank_layer.sums_first(*asked)
