"""Examples packed into one row: the loss and the gradients of sequences read alone, and no padding."""

import collections
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.directions.subspaces import Place, Subspace
from excise.editing.hooks.concept_ablation import concept_ablated
from excise.editing.hooks.token_counts import count_tokens
from excise.editing.training.packing import packing
from excise.recipes.common.examples import Example, completion_loss, example_batch
from excise.recipes.common.memory_sizes import Rows
from excise.recipes.common.packed_training import packed_examples, packs, planned_rows
from helpers import PICO, SMALL_TESTBED
from training_rows import trained_weights
from unlearning_rows import FORGET, RETAIN, adapted

EXAMPLES = [*FORGET, *RETAIN, Example(tuple(range(20, 44)), 5)]


def _gradients(model, batch):
    model.zero_grad()
    loss = completion_loss(model, batch)["completion"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("ablates", [False, True])
def test_completions_in_one_row_are_learned_as_each_alone(ablates):
    model = adapted()
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(0))).Q
    some = Subspace(Place(1, "input"), basis, torch.zeros(32), ("a", "b"), (1.0, 1.0), "random")
    removed = [some] if ablates else []
    row = ARCHITECTURES["llama"]
    with packed_examples(model) as collate, concept_ablated(model, row, removed, "both", "zero"):
        every = [_gradients(model, example_batch([example])) for example in EXAMPLES]
        wanted = sum(loss for loss, _ in every) / len(every), torch.stack([one for _, one in every]).mean(0)
        batch = collate(EXAMPLES)
        assert "blocks" in batch
        loss, found = _gradients(model, batch)
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    assert (found - wanted[1]).norm() < 1e-4 * wanted[1].norm()
    # Read as one sequence, each would see those before it.
    loss, found = _gradients(model, batch)
    assert (found - wanted[1]).norm() > 0.05 * wanted[1].norm()


def test_a_packed_row_holds_no_padding_where_padded_rows_do():
    model, seen = adapted(), collections.Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    total = sum(len(example.ids) for example in EXAMPLES)
    with packing(model):
        seen.clear()
        completion_loss(model, example_batch(EXAMPLES, in_one_row=True))
        assert (seen["tokens"], seen["padding"]) == (total, 0)
    seen.clear()
    completion_loss(model, example_batch(EXAMPLES))
    assert seen["tokens"] == total + seen["padding"] and seen["padding"] > total / 2


def test_what_recomputes_activations_reads_padded_rows():
    model = adapted()
    before = trained_weights(model)
    with packed_examples(model) as collate:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert "blocks" not in collate(EXAMPLES)
        model.gradient_checkpointing_disable()
        assert "blocks" in collate(EXAMPLES)
    assert torch.equal(trained_weights(model), before)


@pytest.mark.parametrize(("checkpoints", "rows"), [(False, Rows(1, 14)), (True, Rows(3, 9))])
def test_a_step_is_planned_without_padding_where_it_is_read_so(checkpoints, rows):
    config = json.loads((Path(SMALL_TESTBED) / "config.json").read_text())
    run = SimpleNamespace(checkpoint=SimpleNamespace(config=config))
    job = SimpleNamespace(run=run, settings=SimpleNamespace(gradient_checkpointing=checkpoints))
    assert planned_rows(job, [[2, 9, 3], [1, 2, 4]]) == rows


def test_whether_a_model_packs_is_found_out_from_its_configuration_alone():
    assert packs({"model_type": "llama", **PICO["llama"]})
    # What mixes positions otherwise than by attention does not, nor what is no model.
    assert not packs({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2})
    assert not packs({"model_type": "nonsense"})
