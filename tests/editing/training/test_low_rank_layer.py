"""A layer with a low-rank update, however it is computed, against its definition in float64."""

import pytest
import torch
from excise.editing.training.adapters import AdapterShape, attach
from excise.editing.training.low_rank_layer import together
from excise.editing.training.low_rank_products import Updated, products, sums_pay
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
    assert sums_pay(layer.base_layer.weight, x) == sums
    out = layer(x)
    upstream = torch.randn_like(out)
    found = [out, *torch.autograd.grad(out, (x, down, up), upstream)]
    for one, other in zip(found, _wanted(layer, x, upstream), strict=True):
        assert one.shape == other.shape and (one.double() - other).norm() < 1e-5 * other.norm() > 0
        # States of a training hold gradients, and files hold no other tensors.
        assert one.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pieces", [1, 3])
def test_products_of_one_input_are_those_of_each_part_and_piece(dtype, pieces):
    exact = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float64: 1e-12}[dtype]
    generator = torch.Generator().manual_seed(0)
    drawn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    trained = torch.float64 if dtype == torch.float64 else torch.float32
    x = drawn(2, 30, 16).to(dtype).requires_grad_()
    counts = [60] if pieces == 1 else [10, 31, 19]
    parts, factors = [], []
    for width in (12, 20):
        downs = [drawn(3, 16).to(trained).requires_grad_() for _ in range(pieces)]
        ups = [drawn(width, 3).to(trained).requires_grad_() for _ in range(pieces)]
        parts.append(Updated(drawn(width, 16).to(dtype), drawn(width).to(dtype), downs, ups, 0.5, counts))
        factors += [*downs, *ups]
    upstream = [drawn(2, 30, width).to(dtype) for width in (12, 20)]
    outputs = products(x, parts)
    found = [*outputs, *torch.autograd.grad(outputs, [x, *factors], upstream)]
    double = x.detach().double().requires_grad_()
    copies, wanted = [one.detach().double().requires_grad_() for one in factors], []
    for number, part in enumerate(parts):
        some = copies[2 * pieces * number :]
        pieces_out = [
            piece @ (part.weight.double() + 0.5 * some[pieces + turn] @ some[turn]).mT + part.bias.double()
            for turn, piece in enumerate(double.view(60, 16).split(counts))
        ]
        wanted.append(torch.cat(pieces_out).view(2, 30, -1))
    wanted += torch.autograd.grad(wanted, [double, *copies], [one.double() for one in upstream])
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        assert (one.double() - other).norm() < exact * other.norm() > 0
    assert [one.dtype for one in found] == [dtype] * 3 + [trained] * len(factors)
    # A gradient shares its memory with no other: states of a training are stored one by one.
    assert len({one.untyped_storage().data_ptr() for one in found}) == len(found)


def test_a_layer_that_is_looked_into_is_called_by_itself():
    x, layer, seen = torch.randn(1, 512, 32), _layer(), []
    exact = layer(x)
    assert layer.plain_part(x) is not None and layer.plain_part(x.bfloat16()) is None
    # A hook sees what the frozen layer alone says, and ablations change it.
    with layer.base_layer.register_forward_hook(lambda *parts: seen.append(parts[2])):
        assert layer.plain_part(x) is None
        torch.testing.assert_close(layer(x), exact)
    assert len(seen) == 1 and not torch.allclose(seen[0], exact)
    with layer.register_forward_hook(lambda *parts: 0 * parts[2]):
        assert not any(one.any() for one in together([layer, layer], x))
    assert all(torch.equal(one, exact) for one in together([layer, layer], x))
    layer.base_layer.weight.requires_grad_(True)
    assert layer.plain_part(x) is None
