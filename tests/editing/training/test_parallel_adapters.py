"""Attackers in one forward are attackers alone, and leave nothing behind."""

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.modules import final_hidden
from excise.editing.numerics.operation_counts import OperationCounts
from excise.editing.training import low_rank_products
from excise.editing.training.adapters import adapter_modules
from excise.editing.training.packing import packed, packing, read_packed
from excise.editing.training.parallel_adapters import (
    ParallelAdapters,
    SideBySide,
    embedded,
    latent_attackers,
    low_rank_attackers,
    soft_prompt_attackers,
)
from helpers import make_pico
from torch import nn

IDS = torch.tensor([[5, 9, 7, 3, 11], [8, 2, 6, 4, 10], [3, 3, 5, 9, 1], [7, 6, 5, 4, 3]])


def _kinds(name, model, seeds):
    row = ARCHITECTURES[name]
    modules = adapter_modules(model, row, range(2))
    return {
        "lora": lambda: low_rank_attackers(model, modules, 2, 2.0, seeds),
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


ROWS = [[(5, 9, 7, 3), (8, 2, 6, 4, 10, 11, 12)], [(3, 5, 9)], [(7, 6, 5, 4, 3), (9, 8, 7), (2, 4, 6, 8, 10, 12)]]
"""Of each attacker, as many sequences as it likes."""


def _gradients(attackers, model, rows_of):
    """What each attacker's parameters get of the likelihood of its last tokens; ``rows_of`` gives final hidden states."""
    loss = 0.0
    for hidden, rows in rows_of:
        logits = model.get_output_embeddings()(hidden)
        loss = loss + torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor([row[-1] for row in rows]), reduction="sum"
        )
    loss.backward()
    found = [torch.cat([p.grad.flatten() for p in owned]) for owned in attackers.owned]
    for parameter in (p for owned in attackers.owned for p in owned):
        parameter.grad = None
    return found


@pytest.mark.parametrize("kind", ["lora", "soft", "latent"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attackers_learn_of_one_packed_row_what_each_learns_of_its_sequences_alone(name, kind):
    model = make_pico(name)
    model.set_attn_implementation("sdpa")
    every = [row for rows in ROWS for row in rows]
    ends = torch.tensor([len(row) for row in every]).cumsum(0) - 2
    tokens = [sum(map(len, rows)) for rows in ROWS]
    with packing(model) as can, _kinds(name, model, [1, 2, 3])[kind]() as attackers:
        assert can
        with torch.no_grad():
            for parameter in (p for owned in attackers.owned for p in owned):
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
                )

        def alone():
            for place, rows in enumerate(ROWS):
                with attackers.only(place):
                    for row in rows:
                        yield final_hidden(model, {"input_ids": torch.tensor([row])})[0, -2:-1], [row]

        def together(tokens):
            with attackers.sharing((0, 1, 2), tokens):
                yield read_packed(model, packed(every))[ends], every

        wanted, found = _gradients(attackers, model, alone()), _gradients(attackers, model, together(tokens))
        for one, other in zip(wanted, found, strict=True):
            assert (one - other).norm() < 1e-4 * one.norm() and one.norm() > 1e-3
        # Tokens of another attacker are not its own.
        wrong = _gradients(attackers, model, together([*reversed(tokens)]))
        assert (wanted[0] - wrong[0]).norm() > 0.01 * wanted[0].norm()
        with (
            attackers.sharing((0, 1, 2), [1, 1, 1]),
            pytest.raises(ValueError, match="of which attackers are given 3"),
        ):
            read_packed(model, packed(every))
        assert attackers.tokens is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_bfloat16_is_made_in_float32_and_rounded_once(bias, monkeypatch):
    torch.manual_seed(0)
    inner = torch.nn.Linear(48, 40, bias=bias).bfloat16().requires_grad_(False)
    attackers = ParallelAdapters(2)
    layer = SideBySide(inner, attackers, [4, 4], 2.0, [0, 1])
    for parameter in layer.up:
        parameter.data.normal_()
    x, above = torch.randn(2, 50, 48).bfloat16(), torch.randn(2, 50, 40).bfloat16()
    attackers.assigned = (0, 1)

    def step():
        values = x.clone().requires_grad_(True)
        output = layer(values)
        output.backward(above)
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        return [output.detach(), values.grad, *grads]

    def naive():
        wide = x.double().requires_grad_(True)
        downs, ups = (
            torch.stack([p.detach().double() for p in each]).requires_grad_(True) for each in (layer.down, layer.up)
        )
        output = torch.nn.functional.linear(wide, inner.weight.double(), inner.bias.double() if bias else None)
        output = output + 2.0 * wide @ downs.mT @ ups.mT
        output.backward(above.double())
        return [output.detach(), wide.grad, *downs.grad, *ups.grad]

    wanted, native = naive(), step()
    # Autocast, which a trainer may have on, changes nothing of it.
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(low_rank_products, "faster_in_float32", lambda weight, positions: positions == 100)
        widened = step()
    for exact, one, other in zip(wanted, native, widened, strict=True):
        assert one.dtype == other.dtype
        far = [float((got.double() - exact).norm() / exact.norm()) for got in (one, other)]
        assert far[1] <= far[0] * 1.01 < 0.01 and far[1] < 0.003


def _layer(counts, positions=64):
    """A linear layer with attackers, inputs with a gradient, and what it is to compute, in float64 from the definition."""
    torch.manual_seed(0)
    linear, attackers = nn.Linear(32, 24), ParallelAdapters(len(counts))
    linear.requires_grad_(False)
    layer = SideBySide(linear, attackers, [4 + n for n in range(len(counts))], 2.0, range(len(counts)))
    with torch.no_grad():
        for up in layer.up:
            up += 0.3 * torch.randn_like(up)
    x = torch.randn(1, sum(counts), 32, requires_grad=True)
    wide = [one.detach().double().requires_grad_() for one in (x, *layer.down, *layer.up)]
    downs, ups = wide[1 : 1 + len(counts)], wide[1 + len(counts) :]
    weight, bias = linear.weight.double(), linear.bias.double()
    pieces = zip(wide[0][0].split(list(counts)), downs, ups, strict=True)
    wanted = torch.cat([piece @ (weight + 2.0 * up @ down).mT + bias for piece, down, up in pieces])[None]
    return layer, attackers, x, wanted, wide


@pytest.mark.parametrize(("counts", "products"), [((64,), 1), ((3,), 3), ((20, 50), 5)])
def test_a_layers_output_and_gradients_are_the_definitions_in_few_products(counts, products):
    layer, attackers, x, wanted, wide = _layer(counts)
    with attackers.sharing(range(len(counts)), counts):
        with torch.no_grad(), OperationCounts() as operations:
            layer(x)
        found = layer(x)
    # Of one attacker who is asked much, weight and update are summed, and one product serves both.
    named = operations.by_name
    assert named["aten.mm"] + named["aten.addmm_"] + named["aten.addmm"] - (products == 1) == products
    above = torch.randn(wanted.shape, dtype=torch.float64)
    wanted.backward(above)
    found.backward(above.float())
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    for narrow, exact in zip((x, *layer.down, *layer.up), wide, strict=True):
        assert narrow.grad.is_contiguous()
        torch.testing.assert_close(narrow.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)


def test_a_hooked_layer_is_called_and_another_attackers_factors_give_another_output():
    layer, attackers, x, wanted, _ = _layer((64,))
    with attackers.only(0), torch.no_grad():
        torch.testing.assert_close(layer(x).double(), wanted, atol=1e-4, rtol=1e-4)
        handle = layer.inner.register_forward_hook(lambda module, args, output: output + 1)
        torch.testing.assert_close(layer(x).double(), wanted + 1, atol=1e-4, rtol=1e-4)
        handle.remove()
        layer.up[0] += 0.1
        assert (layer(x).double() - wanted).abs().max() > 0.01


@pytest.mark.parametrize(("counts", "together"), [((20, 50, 30, 10, 16), 1), ((9,) * 8, 2)])
def test_narrow_products_in_bfloat16_are_shared_and_each_attacker_gets_its_own(counts, together, monkeypatch):
    monkeypatch.setattr("excise.editing.training.low_rank_products.faster_in_float32", lambda *_: False)
    layer, attackers, x, _, _ = _layer(counts)
    layer = layer.bfloat16()
    exact = [one.detach().double().requires_grad_() for one in (x.bfloat16(), *layer.down, *layer.up)]
    downs, ups = exact[1 : 1 + len(counts)], exact[1 + len(counts) :]
    weight, bias = layer.inner.weight.double(), layer.inner.bias.double()
    pieces = zip(exact[0][0].split(list(counts)), downs, ups, strict=True)
    wanted = torch.cat([piece @ (weight + 2.0 * up @ down).mT + bias for piece, down, up in pieces])[None]
    narrow = x.detach().bfloat16().requires_grad_()
    with attackers.sharing(range(len(counts)), counts):
        with torch.no_grad(), OperationCounts() as operations:
            before = layer(narrow)
        found = layer(narrow)
        named = operations.by_name
        # The frozen weight's, and for each group one down and one up.
        assert named["aten.mm"] + named["aten.addmm_"] + named["aten.addmm"] == 1 + 2 * together
        above = torch.randn(wanted.shape)
        found.backward(above.bfloat16())
        wanted.backward(above.bfloat16().double())
        values = [
            (found, wanted),
            *((a.grad, b.grad) for a, b in zip((narrow, *layer.down, *layer.up), exact, strict=True)),
        ]
        for got, truth in values:
            assert (got.double() - truth).norm() < 0.01 * truth.norm() and truth.norm() > 1
        # Another attacker's factors, of whatever size, change nothing of what is not its own.
        with torch.no_grad():
            layer.down[1].mul_(1e30)
            after = layer(narrow)
    own = slice(counts[0], counts[0] + counts[1])
    assert not torch.equal(after[0, own], before[0, own])
    rest = torch.ones(sum(counts), dtype=torch.bool)
    rest[own] = False
    assert torch.equal(after[0, rest], before[0, rest])
