"""The anatomy of an edit tells a low-rank adapter, rounded or not, from a fine-tune and from rounding alone."""

import numpy as np
import pytest
import torch
from excise.eval.anatomy import anatomy, effective_rank, layer_of, part_of, shares_of, spectrum_of


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _spectrum(change):
    return spectrum_of(torch.linalg.svdvals(change.double()))


def _naive(values):
    """From the definitions, one value at a time."""
    squares = [value * value for value in values]
    entropy = -sum(p * np.log(p) for value in values if (p := value / sum(values)) > 0)
    rank = next(r for r in range(1, len(values) + 1) if sum(squares[:r]) >= 0.99 * sum(squares))
    falls = [values[r] / values[r + 1] for r in range(len(values) - 1)]
    return np.exp(entropy), sum(squares) / squares[0], rank, max(falls), falls.index(max(falls)) + 1


@pytest.mark.parametrize("seed", range(4))
def test_each_figure_is_its_definition(seed):
    change = _drawn(24, 5, seed=seed) @ _drawn(5, 40, seed=seed + 9) + 0.05 * _drawn(24, 40, seed=seed + 20)
    values = torch.linalg.svdvals(change.double())
    found, (entropy, stable, rank, fall, place) = spectrum_of(values), _naive(values.tolist())
    assert found.effective_rank == pytest.approx(entropy) and found.stable_rank == pytest.approx(stable)
    assert (found.rank_99, found.cliff_rank) == (rank, place) and found.cliff == pytest.approx(fall)


def test_an_adapter_that_was_rounded_into_its_weights_ends_in_a_cliff_at_its_rank():
    weight = 0.05 * _drawn(96, 128)
    update = 0.02 * _drawn(96, 8, seed=1) @ _drawn(8, 128, seed=2)
    stored = (weight + update).bfloat16().float() - weight.bfloat16().float()
    found = _spectrum(stored)
    assert found.shallow and found.cliff_rank == 8


@pytest.mark.parametrize("change", [
    0.05 * (_drawn(96, 128) + 1e-3 * _drawn(96, 128, seed=3)).bfloat16().float() - 0.05 * _drawn(96, 128),
    _drawn(96, 128),
    _drawn(96, 60) @ _drawn(60, 128, seed=1),
], ids=["rounding", "dense", "more than a quarter of all ranks"])  # fmt: skip
def test_rounding_a_dense_change_and_one_of_many_ranks_are_not_shallow(change):
    assert not _spectrum(change).shallow


def test_an_exactly_low_rank_change_has_a_finite_cliff_and_a_vector_has_none():
    found = spectrum_of(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    assert found.shallow and found.cliff_rank == 2 and found.cliff < float("inf")
    assert spectrum_of(torch.tensor([2.0])).cliff is None


def test_effective_rank_is_between_one_and_the_number_of_directions():
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.ones(7)) == pytest.approx(7.0)


@pytest.mark.parametrize(("name", "part", "layer"), [
    ("model.layers.3.self_attn.q_proj.weight", "attention", 3), ("transformer.h.0.attn.c_attn.weight", "attention", 0),
    ("model.layers.11.mlp.down_proj.weight", "mlp", 11), ("model.layers.2.mlp.experts.5.w1.weight", "mlp", 2),
    ("gpt_neox.layers.1.attention.dense.weight", "attention", 1), ("model.decoder.layers.0.fc1.weight", "mlp", 0),
    ("backbone.layers.4.mixer.in_proj.weight", "attention", 4), ("model.embed_tokens.weight", "embedding", None),
    ("lm_head.weight", "embedding", None), ("model.layers.0.input_layernorm.weight", "other", 0),
    ("model.layers.0.self_attn.q_norm.weight", "other", 0), ("transformer.h.1.ln_1.weight", "other", 1),
])  # fmt: skip
def test_a_tensor_belongs_to_a_part_and_a_layer_by_its_name(name, part, layer):
    assert (part_of(name), layer_of(name)) == (part, layer)


def test_shares_are_of_the_squared_norm_and_sum_to_one():
    shares = shares_of([("layers.0.mlp.up_proj.weight", 1.0), ("layers.0.self_attn.q_proj.weight", 3.0)])
    assert shares == {"attention": pytest.approx(0.9), "mlp": pytest.approx(0.1)} and next(iter(shares)) == "attention"
    assert shares_of([]) == {}


def test_what_is_said_of_a_dense_change_does_not_call_it_shallow():
    dense = spectrum_of(torch.linspace(2.0, 1.0, 8))
    said = anatomy([("model.layers.0.mlp.up_proj.weight", 1.0, dense)], ["model.layers.0.mlp.up_proj.weight"])
    assert said.sentences()[-1].startswith("no cliff in the singular values of any of 1 matrices")
    assert anatomy([], ["model.layers.0.mlp.up_proj.weight"]).sentences() == []
