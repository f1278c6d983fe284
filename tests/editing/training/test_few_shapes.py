"""Rows filled up to one of few lengths, for processors that compile a product for each: nothing else changes."""

import collections
import random

import pytest
import torch
from excise.editing.hooks.token_counts import count_tokens
from excise.editing.modules import final_hidden
from excise.editing.training.packing import GRAIN, in_few_shapes, packed, packing, read_packed
from excise.editing.training.parallel_adapters import ParallelAdapters
from helpers import make_pico

ROWS = [(5, 6, 7, 8, 9), (5, 6, 7, 3), (4, 6, 7), (5, 6), (5, 6, 7, 8, 2, 2, 2), (4, 6, 7), (8, 9, 5, 6, 7, 8)]
ALIKE = [tuple(random.Random(n).choices(range(3, 90), k=16)) for n in range(3)]
"""As long as a block's shortest, so that nothing of the block is padding."""


def _packed(rows, owners=None, **how):
    token = in_few_shapes.set(True)
    try:
        return packed(rows, owners, **how)
    finally:
        in_few_shapes.reset(token)


def _gradients(model, hidden, weights):
    model.zero_grad()
    (hidden.square() * weights[:, None]).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("rows", [ROWS, ALIKE])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_states_and_gradients_are_those_of_each_sequence_alone(name, rows):
    model = make_pico(name).double()
    model.set_attn_implementation("sdpa")
    weights = torch.rand(sum(map(len, rows)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = torch.cat([final_hidden(model, {"input_ids": torch.tensor([row])})[0] for row in rows])
    wanted = _gradients(model, alone, weights)
    inputs = _packed(rows)
    # A row that needs no filling needs some with one more sequence.
    inputs = inputs if len(inputs["filling"]) else _packed([*rows, (1,)])
    count = len(weights)
    assert len(inputs["filling"]) and inputs["input_ids"].shape[1] % GRAIN == 0
    with packing(model):
        together = read_packed(model, inputs)[inputs["where"]][:count]
        found = _gradients(model, together, weights)
        # Where what fills up takes a sequence's own, gradients go astray.
        wrong = inputs["real"].clone()
        wrong[inputs["filling"]] = int(wrong[inputs["where"][1]])
        lost = _gradients(model, read_packed(model, inputs | {"real": wrong})[inputs["where"]][:count], weights)
    near = 1e-12 if name == "gpt2" else 1e-6
    assert (together - alone).norm() < near * alone.norm()
    assert (found - wanted).norm() < near * wanted.norm()
    assert (lost - wanted).norm() > 0.01 * wanted.norm()


def test_many_rows_have_few_lengths_little_is_added_and_it_counts_as_padding():
    rng, lengths, blocks, added = random.Random(0), set(), set(), 0
    for _ in range(200):
        rows = [tuple(rng.choices(range(3, 900), k=rng.randint(8, 40))) for _ in range(16)]
        inputs = _packed(rows)
        lengths.add(inputs["input_ids"].shape[1])
        blocks |= {(block["length"], len(block["taken"])) for block in inputs["blocks"]}
        added += len(inputs["filling"]) / inputs["input_ids"].shape[1]
    assert len(lengths) <= 12 and len(blocks) <= 8 and added / 200 < 0.06
    model, seen = make_pico("llama").bfloat16(), collections.Counter()
    model.set_attn_implementation("sdpa")
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    # A model in 16 bits asks for it, one in fp32 does not.
    with packing(model), torch.no_grad():
        assert in_few_shapes.get()
        seen.clear()
        read_packed(model, packed(ROWS))
    assert (seen["tokens"], seen["padding"]) == (24, 6)
    with packing(model.float()):
        assert not in_few_shapes.get()
    assert not in_few_shapes.get() and not packed(ROWS)["filling"].numel()


def test_each_owners_tokens_are_filled_up_behind_its_own():
    inputs = _packed([(5, 6, 7), (5, 6, 8), (5, 6, 7), (5, 9)], owners=[0, 0, 1, 1])
    assert inputs["owned"] == [8, 8] and inputs["filling"].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert inputs["where"].tolist() == [0, 1, 2, 0, 1, 3, 8, 9, 10, 8, 11]
    assert len(inputs["real"]) == 16 and len(set(inputs["real"][inputs["filling"]].tolist())) == 1


def test_owners_that_are_multiplied_together_are_filled_up_once_and_what_is_only_read_hardly():
    rows, owners = [(number, 7, 7) for number in range(20, 60)], [number // 10 for number in range(40)]
    assert _packed(rows, owners)["owned"] == [32, 32, 32, 32]
    inputs = _packed(rows, owners, ends={1, 3})
    assert inputs["owned"] == [30, 34, 30, 34] and inputs["filling"].tolist() == [60, 61, 62, 63, 124, 125, 126, 127]
    assert _packed(rows, owners, ends=())["owned"] == [30, 30, 30, 30]
    long = [tuple(range(number, number + 9)) for number in range(100, 900, 10)]
    assert _packed(long)["input_ids"].shape == (1, 768) and _packed(long, trained=False)["input_ids"].shape == (1, 720)


def test_attackers_of_few_ranks_end_together_in_bfloat16_alone():
    attackers = ParallelAdapters(6)
    assert attackers.ends(range(6), torch.bfloat16) == set()
    attackers.ranks = [8, 8, 16, 8, 32, 4]
    assert attackers.ends(range(6), torch.bfloat16) == {2, 3, 4, 5}
    assert attackers.ends([0, 1, 3, 5], torch.bfloat16) == {3}
    assert attackers.ends(range(6), torch.float32) == set(range(6))
