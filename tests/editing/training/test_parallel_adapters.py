"""Attackers in one forward are attackers alone, and leave nothing behind."""

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.training.adapters import adapter_modules
from excise.editing.training.parallel_adapters import (
    embedded,
    latent_attackers,
    low_rank_attackers,
    soft_prompt_attackers,
)
from helpers import make_pico

IDS = torch.tensor([[5, 9, 7, 3, 11], [8, 2, 6, 4, 10], [3, 3, 5, 9, 1], [7, 6, 5, 4, 3]])


def _kinds(name, model, seeds):
    row = ARCHITECTURES[name]
    modules = adapter_modules(model, row, range(2))
    return {
        "lora": lambda: low_rank_attackers(model, modules, 2, 4.0, seeds),
        "soft": lambda: soft_prompt_attackers(model, 2, seeds),
        "latent": lambda: latent_attackers(model, row, 0, seeds),
    }


def _step(attackers, model, ids, rate=0.5):
    """One step of plain gradient descent on each attacker's own rows."""
    logits = model(input_ids=ids).logits
    losses = torch.nn.functional.cross_entropy(logits[:, -2], ids[:, -1], reduction="none")
    losses.sum().backward()
    with torch.no_grad():
        for parameter in (p for owned in attackers.owned for p in owned):
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
                parameter.grad = None


def _train(name, kind, seeds, steps=3):
    """Every attacker has its own rows: the first half, the second."""
    model = make_pico(name)
    with _kinds(name, model, seeds)[kind]() as attackers:
        for _ in range(steps):
            attackers.assigned = range(len(seeds))
            _step(attackers, model, IDS)
        return [[p.detach().clone() for p in owned] for owned in attackers.owned]


@pytest.mark.parametrize("kind", ["lora", "soft", "latent"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_attacker_ends_where_it_would_have_alone(name, kind):
    together = _train(name, kind, [1, 2])
    model = make_pico(name)
    with _kinds(name, model, [1])[kind]() as attackers:
        for _ in range(3):
            attackers.assigned = (0,)
            _step(attackers, model, IDS[:2])
        alone = [p.detach().clone() for p in attackers.owned[0]]
    for one, other, second in zip(together[0], alone, together[1], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
        assert not torch.allclose(one, second, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "soft", "latent"])
def test_afterwards_the_model_is_what_it_was(kind):
    model = make_pico("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
    with pytest.raises(KeyboardInterrupt), _kinds("llama", model, [1])[kind]() as attackers:
        attackers.assigned = (0,)
        for _ in range(2):
            _step(attackers, model, IDS, rate=5.0)
        with torch.no_grad():
            assert not torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-3)
        raise KeyboardInterrupt
    after = dict(model.named_parameters())
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in after.values())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_rows_that_cannot_be_shared_equally_are_refused():
    model = make_pico("llama")
    with _kinds("llama", model, [1, 2])["lora"]() as attackers:
        attackers.assigned = (0, 1)
        with pytest.raises(ValueError, match="3 rows cannot be shared equally by 2 attackers"):
            model(input_ids=IDS[:3])
        with attackers.only(1):
            model(input_ids=IDS[:3])
        assert attackers.assigned == (0, 1)


@pytest.mark.parametrize("kind", ("lora", "latent"))
def test_parameters_are_where_the_model_is(kind):
    # A device without data stands for a GPU. How large a soft prompt starts cannot be read there.
    model = make_pico("llama").to("meta")
    with _kinds("llama", model, (0, 1))[kind]() as attackers:
        assert {value.device.type for owned in attackers.owned for value in owned} == {"meta"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_a_soft_prompt_of_tokens_embeddings_is_those_tokens(name):
    model = make_pico(name)
    expected = model(input_ids=IDS).logits
    table = model.get_input_embeddings().weight.detach()
    with soft_prompt_attackers(model, 2, (0,)) as attackers:
        (prompt,) = attackers.owned[0]
        # It starts as large as what stands around it: the norms of rows of random weights lie close together.
        around = embedded(model, IDS.flatten()).norm(dim=-1).mean()
        assert 0.5 < float(prompt.norm(dim=-1).mean() / around) < 2
        prompt.data = embedded(model, IDS[0, :2])
        found = model(input_ids=torch.cat([torch.zeros_like(IDS[:1, :2]), IDS[:1, 2:]], 1)).logits
        torch.testing.assert_close(found, expected[:1], atol=1e-4, rtol=1e-4)
        prompt.data = table[IDS[0, :2]].float()
        raw = model(input_ids=torch.cat([torch.zeros_like(IDS[:1, :2]), IDS[:1, 2:]], 1)).logits
        assert name.startswith("gemma") == bool((raw - expected[:1]).abs().max() > 1e-2)
