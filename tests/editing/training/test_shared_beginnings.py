"""Sequences of one packed row that begin alike: their beginning is read once, and all is computed as of each alone."""

import collections

import pytest
import torch
from excise.editing.hooks.token_counts import count_tokens
from excise.editing.modules import final_hidden
from excise.editing.training.packing import is_packing, packed, packing, read_packed
from helpers import make_pico

ROWS = [(5, 6, 7, 8, 9), (5, 6, 7, 3), (4, 6, 7), (5, 6), (5, 6, 7, 8, 2, 2, 2), (4, 6, 7), (8, 9, 5, 6, 7, 8)]
DISTINCT = len({row[:end] for row in ROWS for end in range(1, len(row) + 1)})


def _model(name="llama"):
    model = make_pico(name).double()
    model.set_attn_implementation("sdpa")
    return model


def _gradients(model, hidden, weights):
    model.zero_grad()
    (torch.cat(hidden).square() * weights[:, None]).sum().backward()
    # A model without tied weights has an unembedding too, which nothing here reads.
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_states_and_gradients_are_those_of_each_sequence_alone(name):
    model, total = _model(name), sum(map(len, ROWS))
    # Each token of each sequence counts otherwise, those that stand in the row once as well.
    weights = torch.rand(total, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = [final_hidden(model, {"input_ids": torch.tensor([row])})[0] for row in ROWS]
    wanted = _gradients(model, alone, weights)
    with packing(model) as can:
        assert can
        inputs = packed(ROWS)
        together = read_packed(model, inputs)
        found = _gradients(model, [together[inputs["where"]]], weights)
    # Norms of the Llama family compute in float32 whatever the model does.
    near = 1e-12 if name == "gpt2" else 1e-6
    together = together[inputs["where"]]
    assert (together - torch.cat(alone)).norm() < near * together.norm()
    assert (found - wanted).norm() < near * wanted.norm()
    # A gradient that leaves out where sequences look at the same beginning is another one.
    with packing(model):
        lost = _gradients(
            model, [read_packed(model, inputs | {"again": inputs["again"][:, :0]})[inputs["where"]]], weights
        )
    assert (lost - wanted).norm() > 0.01 * wanted.norm()


def test_a_beginning_is_read_once_whoever_comes_first():
    model, seen = _model(), collections.Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    for rows in (ROWS, ROWS[::-1]):
        with packing(model), torch.no_grad():
            seen.clear()
            read_packed(model, packed(rows))
        assert seen["tokens"] == DISTINCT == 18 < sum(map(len, rows)) == 30


def test_tokens_that_stand_behind_others_are_not_shared():
    # The same tokens, at the same places or not, behind another beginning.
    inputs = packed([(1, 5, 6), (2, 5, 6), (5, 6)])
    assert inputs["input_ids"].tolist() == [[1, 5, 6, 2, 5, 6, 5, 6]] and not inputs["again"].numel()
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1]]


def test_owners_share_nothing_and_stand_one_after_another():
    inputs = packed([(5, 6, 7), (5, 6, 8), (5, 6, 7), (5, 9)], owners=[0, 0, 1, 1])
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 5, 6, 7, 9]] and inputs["owned"] == [4, 4]
    assert inputs["where"].tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 4, 7]


def test_a_context_inside_another_leaves_its_end_to_that_one():
    model = _model()
    with packing(model) as outer:
        with packing(model) as inner:
            assert outer and inner
        assert is_packing(model)
    assert not is_packing(model)
