"""Pruned units are silent, come back or do not as their semantics say, and scores find those that matter."""

import copy

import pytest
import torch
from excise.artifacts.checkpoints.edits import load_edit, save_edit
from excise.artifacts.checkpoints.export import export_edit
from excise.artifacts.checkpoints.read import open_checkpoint, read_tensor
from excise.editing.architectures import ARCHITECTURES, layer_count, residual_width
from excise.editing.edits.base import edit_model
from excise.editing.edits.pruned_units import PrunedUnits, keep_pruned
from excise.editing.edits.unit_choice import UnitScores, combine, in_both, matched_units, top_units
from excise.editing.errors import ExciseError, RequestError
from excise.editing.hooks.unit_scores import (
    UnitAttribution,
    UnitMoments,
    by_head,
    gradients_reach_units,
    mean_difference,
    rank_correlation,
    rank_saliency,
    selectivity,
    unit_inputs,
)
from helpers import make_pico

INPUTS = {
    "input_ids": torch.tensor([[5, 9, 7, 3, 11], [4, 8, 2, 6, 10]]),
    "attention_mask": torch.ones(2, 5, dtype=torch.long),
}
DENSE = [name for name, row in ARCHITECTURES.items() if row.mlp_units]


def _edit(model, semantics="down", neurons=None, heads=None, means=None):
    config = model.config.to_dict()
    return PrunedUnits(
        neurons or {},
        heads or {},
        semantics,
        config["model_type"],
        residual_width(config),
        layer_count(config),
        8,
        means or {},
    )


def _silenced(model, name, units, values=0.0):
    """The untouched model with units held at a value while it runs."""
    row, layers = ARCHITECTURES[name], {}

    def hold(layer, activations):
        layers[layer] = activations
        if layer in units:
            activations[..., list(units[layer])] = values

    with unit_inputs(model, row.mlp_units, row, hold), torch.no_grad():
        return model(**INPUTS).logits


@pytest.mark.parametrize("semantics", ["down", "all", "frozen"])
@pytest.mark.parametrize("name", DENSE)
def test_pruned_weights_are_units_held_at_zero(name, semantics):
    model = make_pico(name)
    units = {0: (1, 5, 40), 1: (0, 47)}
    wanted = _silenced(model, name, units)
    with torch.no_grad():
        before = model(**INPUTS).logits
    edit_model(_edit(model, semantics, units), model, model.config.to_dict())
    with torch.no_grad():
        after = model(**INPUTS).logits
    assert torch.allclose(after, wanted, atol=1e-5) and not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_a_mean_goes_into_the_bias(name):
    model = make_pico(name)
    mean = torch.tensor([0.3, -0.2])
    wanted = _silenced(model, name, {1: (2, 7)}, mean)
    edit_model(_edit(model, "mean", {1: (2, 7)}, means={1: mean}), model, model.config.to_dict())
    with torch.no_grad():
        assert torch.allclose(model(**INPUTS).logits, wanted, atol=1e-5)


def test_without_a_bias_a_mean_is_refused():
    model = make_pico("mistral")
    with pytest.raises(RequestError, match="has no bias to which the mean"):
        edit_model(_edit(model, "mean", {1: (2,)}, means={1: torch.ones(1)}), model, model.config.to_dict())


def test_a_pruned_head_writes_nothing():
    model = make_pico("llama")
    edit_model(_edit(model, heads={0: (2,)}), model, model.config.to_dict())
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert not weight[:, 16:24].any() and weight[:, :16].any() and weight[:, 24:].any()


@pytest.mark.parametrize(("semantics", "grows"), [("down", True), ("all", False), ("frozen", False)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_what_may_grow_back_gets_a_gradient(name, semantics, grows):
    model = make_pico(name)
    edit = _edit(model, semantics, {0: (1, 5)})
    edit_model(edit, model, model.config.to_dict())
    handles = keep_pruned(model, edit, model.config.to_dict()) if semantics == "frozen" else []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = model.get_submodule(f"{ARCHITECTURES[name].layers}.0.{ARCHITECTURES[name].mlp_units}").weight
    columns = weight[:, [1, 5]] if name == "llama" else weight[[1, 5]]
    assert bool(columns.any()) == grows
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_removed_neurons_leave_a_smaller_model_that_computes_the_same(name, sharded, save_pico, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_pico(name)
    checkpoint = save_pico(name, **({"max_shard_size": "60KB"} if sharded else {}))
    units = dict.fromkeys(range(layer_count(checkpoint.config)), (1, 5, 40))
    wanted = _silenced(model, name, units)
    with torch.no_grad():
        before = model(**INPUTS).logits
    out = tmp_path / "out"
    out.mkdir()
    save_edit(_edit(model, "remove", units), tmp_path / "edit")
    export_edit(load_edit(tmp_path / "edit"), checkpoint, out)
    smaller, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        after = smaller.eval()(**INPUTS).logits
    torch.testing.assert_close(after, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    read, made = open_checkpoint(checkpoint.folder), open_checkpoint(out)
    assert sum(t.size for t in made.tensors.values()) < sum(t.size for t in read.tensors.values())
    same = [n for n, t in read.tensors.items() if made.tensors[n].shape == t.shape]
    assert len(same) < len(read.tensors) and set(made.tensors) == set(read.tensors)
    assert all(torch.equal(read_tensor(read.tensors[n]), read_tensor(made.tensors[n])) for n in same)
    if sharded:
        assert made.index["metadata"]["total_size"] == sum(t.size for t in made.tensors.values())


@pytest.mark.parametrize(
    ("units", "heads"), [({0: (1,)}, {}), ({0: (1,), 1: (2, 3)}, {}), ({0: (1,), 1: (2,)}, {0: (0,)})]
)
def test_what_no_configuration_can_say_is_not_removed(units, heads):
    model = make_pico("llama")
    with pytest.raises(RequestError, match="the same number of neurons from every layer"):
        edit_model(_edit(model, "remove", units, heads), model, model.config.to_dict())
    assert {len(u) for u in top_units(torch.rand(4, 30), 0.2, alike=True).values()} == {6}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_an_exported_edit_is_the_one_in_memory_and_survives_the_disk(name, save_pico, tmp_path):
    model, checkpoint = make_pico(name), save_pico(name)
    edit = _edit(model, "all", {0: (1, 5), 1: (3,)}, {1: (0,)})
    save_edit(edit, tmp_path / "edit")
    loaded = load_edit(tmp_path / "edit")
    assert (loaded.neurons, loaded.heads, loaded.semantics, loaded.head_width) == (edit.neurons, edit.heads, "all", 8)
    (tmp_path / "out").mkdir()
    export_edit(loaded, checkpoint, tmp_path / "out")
    edit_model(edit, model, model.config.to_dict())
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(exported(**INPUTS).logits, model(**INPUTS).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_fused_experts_are_refused(name):
    model = make_pico(name)
    with pytest.raises(ExciseError, match="fused into one tensor"):
        _edit(model, neurons={0: (1,)}).plan(model.config.to_dict(), list(dict(model.named_parameters())))


def test_a_unit_that_is_not_there_is_an_error():
    model = make_pico("llama")
    with pytest.raises(RequestError, match="has 48 units, the edit names unit 48"):
        edit_model(_edit(model, neurons={0: (48,)}), model, model.config.to_dict())


def _moments(values):
    found = UnitMoments(1)
    for part in values.split(7):
        found.see(0, part[None], torch.ones(1, len(part), dtype=torch.bool))
    return found


def test_streamed_scores_are_those_of_all_values_at_once():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(40, 6, generator=generator) + torch.arange(6) / 3, torch.randn(33, 6, generator=generator)
    a, b = _moments(one), _moments(other)
    pooled = ((one.var(0, correction=0) + other.var(0, correction=0)) / 2).sqrt()
    torch.testing.assert_close(
        mean_difference(a, b)[0].float(), (one.mean(0) - other.mean(0)) / pooled, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(selectivity(a, b)[0].float(), one.abs().mean(0) / (other.abs().mean(0) + 1e-5))


def test_padding_does_not_count():
    values = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found, moved = UnitMoments(1), UnitMoments(1)
    found.see(0, values, mask)
    changed = values.clone()
    changed[~mask] = 1e6
    moved.see(0, changed, mask)
    assert torch.equal(found.mean, moved.mean) and found.count == 3


def test_rank_saliency_says_nothing_of_strength():
    strong, weak, rest = torch.randn(50, 300) + torch.arange(300) / 10, torch.zeros(50, 300), torch.zeros(50, 300)
    weak += torch.arange(300) / 1e6
    strong = torch.arange(300).float().expand(50, -1)
    found = [rank_saliency(_moments(values), _moments(rest)) for values in (strong, weak)]
    # The published measure cannot tell a concept from a millionth of it.
    assert torch.equal(found[0], found[1]) and float(found[0].max()) == 1.0


def test_attribution_is_the_gradient_of_the_loss_for_each_units_removal():
    model, row = make_pico("llama"), ARCHITECTURES["llama"]
    seen = UnitAttribution(2)
    with gradients_reach_units(model), unit_inputs(model, row.mlp_units, row, seen.see):
        model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    effect = seen.effect()
    for layer, unit in [(0, 3), (1, 40)]:
        changed = []
        for factor in (1 - 2e-2, 1 + 2e-2):
            scaled = copy.deepcopy(model)
            scaled.model.layers[layer].mlp.down_proj.weight.data[:, unit] *= factor
            with torch.no_grad():
                changed.append(float(scaled.double()(**INPUTS, labels=INPUTS["input_ids"]).loss))
        slope = (changed[0] - changed[1]) / 4e-2
        assert float(effect[layer, unit]) == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_heads_sum_their_columns():
    assert torch.equal(by_head(torch.arange(8.0)[None], 4), torch.tensor([[6.0, 22.0]]))


def test_the_top_share_is_taken_over_all_layers_and_controls_match_it():
    scores = torch.arange(40.0).reshape(2, 20)
    chosen = top_units(scores, 0.25)
    assert chosen == {1: tuple(range(10, 20))}
    assert top_units(scores, 0.0) == {}
    size = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    others = matched_units({0: (1, 2), 1: (5,)}, size, torch.Generator().manual_seed(0))
    assert {layer: len(units) for layer, units in others.items()} == {0: 2, 1: 1}
    assert not set(others[0]) & {1, 2} and others[1] != (5,)


def test_where_more_than_half_of_a_layer_is_chosen_the_control_shares_units_and_says_how_many():
    size = torch.rand(1, 20, generator=torch.Generator().manual_seed(0))
    chosen = {0: tuple(range(14))}
    others = matched_units(chosen, size, torch.Generator().manual_seed(0))
    assert len(set(others[0])) == 14 and in_both(chosen, others) == 8
    assert in_both({0: (1, 2)}, matched_units({0: (1, 2)}, size, torch.Generator().manual_seed(0))) == 0


def test_what_the_rest_needs_is_spared():
    scores = UnitScores(
        torch.tensor([[1.0, 1.0, 0.5]]), torch.tensor([[3.0, 0.0, 0.0]]), torch.ones(1, 3), torch.zeros(1, 3)
    )
    assert top_units(combine(scores, 1.0), 1 / 3) == {0: (1,)}
    assert float(combine(scores, 0.0)[0, 0]) == float(combine(scores, 0.0)[0, 1])


def test_rank_correlation():
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 40])) == pytest.approx(1)
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])) == pytest.approx(-1)
