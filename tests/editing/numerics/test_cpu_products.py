"""Products of bfloat16 that are made in fp32 are as exact, and leave the model as it was."""

import pytest
import torch
from excise.editing.numerics import cpu_products
from excise.editing.numerics.cpu_products import faster_in_float32, widened_products
from helpers import make_pico

IDS = torch.arange(96).view(4, 24)


def test_bfloat16_is_widened_where_its_products_are_slower():
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    assert faster_in_float32(weight, 64) == (not torch.cpu._is_amx_tile_supported())
    assert not faster_in_float32(weight, 63)
    assert not faster_in_float32(weight.float(), 64) and not faster_in_float32(weight.to("meta"), 64)


def _states(model):
    """Logits, and the gradient at what the embeddings give."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeddings).logits
    logits.float().square().mean().backward()
    return logits.detach().double(), embeddings.grad.double()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_model_with_widened_products_is_as_near_to_the_exact_one(name, monkeypatch):
    widened = []

    def everywhere(weight, positions):
        widened.append(positions)
        return True

    monkeypatch.setattr(cpu_products, "faster_in_float32", everywhere)
    model = make_pico(name).bfloat16().requires_grad_(False)
    native, exact = _states(model), _states(make_pico(name).bfloat16().double().requires_grad_(False))
    with pytest.raises(KeyboardInterrupt), widened_products(model):
        # Autocast, which a trainer may have on, changes nothing of it.
        with torch.autocast("cpu", torch.bfloat16):
            found = _states(model)
        # GPT-2's modules are Conv1D, except for its unembedding.
        assert len(widened) == (1 if name == "gpt2" else 15) and set(widened) == {96}
        raise KeyboardInterrupt
    for wanted, one, other in zip(exact, native, found, strict=True):
        assert (other - wanted).norm() < 1.2 * (one - wanted).norm() < 0.1 * wanted.norm()
    assert all(torch.equal(one, other) for one, other in zip(_states(model), native, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_in_training_keep_their_gradient(monkeypatch):
    monkeypatch.setattr(cpu_products, "faster_in_float32", lambda weight, positions: True)
    model = make_pico("llama").bfloat16()
    with widened_products(model):
        model(input_ids=IDS).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.model.layers[1].parameters())
