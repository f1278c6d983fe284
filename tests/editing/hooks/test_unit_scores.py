"""Scores of units from padded batches against one sequence and one token at a time, in every architecture."""

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.directions.subspaces import Place
from excise.editing.hooks.unit_scores import UnitAttribution, UnitMoments, unit_inputs
from excise.recipes.caft.direction_sources import activations
from helpers import PICO, make_pico

ROWS = [(5, 9, 33, 7, 60, 2), (8, 4, 4), (71, 3, 90, 12)]
UNITS = [(name, site) for name in sorted(PICO) for site in ("mlp", "attention")]


def _module(row, site):
    return row.mlp_units if site == "mlp" else row.attention_units


def _batch():
    width = max(map(len, ROWS))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in ROWS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ROWS])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(("name", "site"), UNITS)
def test_moments_of_a_padded_batch_are_those_of_its_tokens(name, site):
    model, row = make_pico(name), ARCHITECTURES[name]
    if _module(row, site) is None:
        pytest.skip(f"{name} has no units there")
    layers = len(model.get_submodule(row.layers))
    moments, batch, seen = UnitMoments(layers), _batch(), [[] for _ in range(layers)]
    with torch.no_grad():
        with unit_inputs(
            model, _module(row, site), row, lambda i, x: moments.see(i, x, batch["attention_mask"].bool())
        ):
            model(**batch)
        for ids in ROWS:
            # One sequence alone has no padding, and its module sees its tokens in order, flattened or not.
            for index, layer in enumerate(model.get_submodule(row.layers)):
                layer.get_submodule(_module(row, site)).register_forward_pre_hook(
                    lambda _, args, i=index: seen[i].append(args[0].reshape(-1, args[0].shape[-1]).double())
                )
            model(input_ids=torch.tensor([ids]))
            for layer in model.get_submodule(row.layers):
                layer.get_submodule(_module(row, site))._forward_pre_hooks.clear()
    assert moments.count == sum(map(len, ROWS))
    for index, parts in enumerate(seen):
        values = torch.cat(parts)
        torch.testing.assert_close(moments.mean[index], values.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.size[index], values.abs().mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_attribution_foretells_what_silencing_a_unit_does(name):
    model, row = make_pico(name), ARCHITECTURES[name]
    layers = len(model.get_submodule(row.layers))
    attribution, batch = UnitAttribution(layers), _batch()
    mask = batch["attention_mask"].bool()

    def loss():
        # Small, so that the first order tells nearly all.
        return model(**batch).logits[mask].double().tanh().mean()

    with unit_inputs(model, row.mlp_units, row, attribution.see):
        loss().backward()
    effect = attribution.effect()
    unit = int(effect[1].abs().argmax())

    def shrink(layer, values):
        if layer == 1:
            values[..., unit] *= 1 - 1e-2

    with torch.no_grad():
        before = loss()
        with unit_inputs(model, row.mlp_units, row, shrink):
            change = float(loss() - before) / 1e-2
    assert change == pytest.approx(float(effect[1, unit]), rel=0.05) and abs(change) > 1e-6


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("site", ["input", "output", "attention", "mlp"])
def test_activations_of_a_batch_are_those_of_each_row(name, site):
    model, row, place = make_pico(name), ARCHITECTURES[name], Place(1, site)
    together = activations(model, row, ROWS, [place])[place]
    for index, ids in enumerate(ROWS):
        alone = activations(model, row, [ids], [place])[place]
        assert alone.shape[:2] == (1, len(ids))
        torch.testing.assert_close(together[index, : len(ids)], alone[0], atol=1e-4, rtol=1e-3)
