"""Sequences packed into one row give the loss and the gradients of sequences read one by one, in few operations."""

from dataclasses import replace

import pytest
import torch
from excise.editing.architectures import ARCHITECTURES
from excise.editing.modules import final_hidden
from excise.editing.numerics.cpu_attention import attend_by_products
from excise.editing.numerics.operation_counts import OperationCounts
from excise.editing.training.adapters import AdapterShape, adapter_modules, attach
from excise.editing.training.packing import packed, packing, read_packed, recomputes
from excise.recipes.common.trainer import Schedule, fit
from excise.recipes.elm.batches import TERMS, SequenceTraining, arrange, collate, sequence_loss
from helpers import PICO, make_pico
from training_rows import Stage, lessons, trained_weights
from transformers import AutoConfig, AutoModelForCausalLM

WEIGHTS = dict.fromkeys(TERMS, 1.0)
PACKS = ("llama", "mistral", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "starcoder2", "olmo2")


def _model(name, attention="sdpa", **changed):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**PICO[name], **changed})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def _adapted(model, name="llama"):
    layers = range(model.config.num_hidden_layers)
    adapted = attach(model, AdapterShape(2, 4.0, adapter_modules(model, ARCHITECTURES[name], layers)), seed=0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return adapted


def _step(adapted, batch):
    adapted.zero_grad()
    terms = sequence_loss(WEIGHTS)(adapted, batch)
    torch.stack(list(terms.values())).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])
    return torch.stack([value.detach() for value in terms.values()]), gradients


def _one_by_one(adapted, sequences):
    """The plain loop: a forward and backward for each, and their mean."""
    every = [_step(adapted, collate([[one]])) for one in sequences]
    return tuple(torch.stack(values).mean(0) for values in zip(*every, strict=True))


@pytest.mark.parametrize("name", PACKS)
def test_packed_sequences_give_the_loss_and_gradients_of_each_alone(name):
    adapted, sequences = _adapted(_model(name).double(), name).double(), lessons(9)
    terms, gradients = _one_by_one(adapted, sequences)
    with packing(adapted) as can:
        assert can
        for most, parts in ((None, 1), (24, 3), (1, 9)):
            batch = collate([[one] for one in sequences], most, in_one_row=True)
            assert len(batch["parts"]) == parts
            found = _step(adapted, batch)
            torch.testing.assert_close(found[0], terms, atol=1e-6, rtol=0)
            assert (found[1] - gradients).norm() < 1e-6 * gradients.norm() and gradients.norm() > 1e-3


def test_a_sliding_window_slides_within_each_sequence():
    model = _model("mistral", sliding_window=3)
    rows = [(5, 6, 7, 8), (9, 10, 11, 12, 13, 14, 15)]
    alone = torch.cat([final_hidden(model, {"input_ids": torch.tensor([row])})[0] for row in rows])
    with torch.no_grad(), packing(model) as can:
        assert can
        torch.testing.assert_close(read_packed(model, packed(rows)), alone.detach(), atol=1e-5, rtol=1e-4)
    wide = _model("mistral", sliding_window=64)
    assert not torch.allclose(final_hidden(wide, {"input_ids": torch.tensor(rows[1:])})[0], alone[4:], atol=1e-3)


def test_bfloat16_attention_by_products_packs_too():
    model = _model("llama").bfloat16()
    attend_by_products(model)
    adapted, sequences = _adapted(model), lessons(9)
    terms, gradients = _one_by_one(adapted, sequences)
    with packing(adapted) as can:
        assert can
        found = _step(adapted, collate([[one] for one in sequences], in_one_row=True))
    torch.testing.assert_close(found[0], terms, atol=0.02, rtol=0.02)
    assert (found[1] - gradients).norm() < 0.05 * gradients.norm()


def test_a_row_holds_its_sequences_in_any_order():
    model = _model("llama", max_position_embeddings=1024)
    rows = [(4,) * 300, (5, 6), tuple(range(20, 50)), (7, 8, 9), (3,) * 280]
    alone = torch.cat([final_hidden(model, {"input_ids": torch.tensor([row])})[0] for row in rows])
    inputs = packed(rows)
    assert inputs["input_ids"][0].tolist() == [token for row in rows for token in row]
    # The first sequence and the last stand in one block.
    assert [(block["length"], len(block["taken"]) // block["length"]) for block in inputs["blocks"]] == [
        (30, 3),
        (300, 2),
    ]
    with torch.no_grad(), packing(model) as can:
        assert can
        torch.testing.assert_close(read_packed(model, inputs), alone.detach(), atol=1e-5, rtol=1e-4)


def test_lengths_far_apart_attend_in_blocks_of_their_own():
    rows = [(3,) * 5] * 6 + [(4,) * 900]
    blocks = packed(rows)["blocks"]
    # No block has fewer keys than a processor's vector holds.
    assert [block["length"] for block in blocks] == [16, 900]
    assert len(packed([(3,) * n for n in range(10, 60)])["blocks"]) == 1
    model = _model("llama", max_position_embeddings=1024)
    with torch.no_grad(), packing(model) as can:
        assert can
        inputs = packed(rows)
        together = read_packed(model, inputs)[inputs["where"]]
        alone = final_hidden(model, {"input_ids": torch.tensor(rows[:1])})[0]
        torch.testing.assert_close(together[5:10], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("why", ["eager attention", "a short convolution"])
def test_a_model_that_cannot_reads_padded_rows(why):
    model = make_pico("llama") if why == "eager attention" else _model("llama")
    usual = model.config._attn_implementation
    if why == "a short convolution":
        # Each position reads the one before it, whatever sequence that is of.
        shift = lambda module, args, output: output + output.roll(1, 1)  # noqa: E731
        model.model.embed_tokens.register_forward_hook(shift)
    training = SequenceTraining.__new__(_Training)
    training.tokens_at_once = 1000
    with training.while_training(model):
        (part,) = training.collate([[one] for one in lessons(3)])["parts"][:1]
    assert "attention_mask" in part and "blocks" not in part
    assert model.config._attn_implementation == usual


class _Training(SequenceTraining):
    def report(self, model):
        return {}


def test_activations_that_are_computed_again_are_of_padded_rows():
    model, training = _model("llama"), SequenceTraining.__new__(_Training)
    training.tokens_at_once = 1000
    with training.while_training(model):
        assert "blocks" in training.collate([[one] for one in lessons(3)])["parts"][0]
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert recomputes(model)
        assert "blocks" not in training.collate([[one] for one in lessons(3)])["parts"][0]


def test_training_on_packed_rows_ends_in_the_weights_of_padded_ones(tmp_path):
    ends = {}
    for in_one_row in (False, True):
        adapted = _adapted(_model("llama"))
        before = trained_weights(adapted)
        groups = arrange({"a": lessons(seed=1), "b": lessons(seed=2)}, 24, 0)
        schedule = Schedule(4, 4, 1e-2, 0, save_every=0)
        with packing(adapted):
            fit(
                adapted, groups, Stage(), tmp_path / str(in_one_row), sequence_loss(WEIGHTS), schedule,
                lambda rows, packs=in_one_row: collate(rows, in_one_row=packs),
            )  # fmt: skip
        ends[in_one_row] = trained_weights(adapted)
        assert (ends[in_one_row] - before).norm() > 0.01
    torch.testing.assert_close(ends[True], ends[False], atol=2e-4, rtol=1e-3)


def test_kinds_that_take_turns_are_read_as_often_and_teach_in_the_mean_what_all_of_a_group_teach(tmp_path):
    kinds = {"forget": lessons(24, 1), "b": lessons(6, 2), "c": lessons(6, 3), "d": lessons(6, 4)}
    turns, every = arrange(kinds, 18, 0, in_turn=True), arrange(kinds, 18, 0)
    assert [len(group) for group in turns] == [2] * 18 and [len(group) for group in every] == [4] * 18
    assert [group[0] for group in turns] == [group[0] for group in every]
    read = [[group[1] for group in turns][start::3] for start in range(3)]
    assert all(sorted(map(id, some)) == sorted(map(id, kinds[kind])) for some, kind in zip(read, "bcd", strict=True))
    model = _adapted(_model("llama"))

    def gradient(groups):
        model.zero_grad()
        torch.stack(list(sequence_loss(WEIGHTS)(model, collate(groups)).values())).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    # What is to be retained alone; of each kind a third of the weight where all stand in a group.
    thirds = [[replace(one, weights=one.weights / 3) for one in group[1:]] for group in every]
    torch.testing.assert_close(gradient([group[1:] for group in turns]), gradient(thirds), atol=1e-6, rtol=1e-4)
    assert not torch.allclose(gradient([group[1:] for group in turns[:9]]), gradient(thirds), atol=1e-4)
    # A single kind has every turn.
    pair = {"forget": kinds["forget"], "b": kinds["b"]}
    assert arrange(pair, 18, 0, in_turn=True) == arrange(pair, 18, 0)


SMOLLM2 = {
    "num_hidden_layers": 30, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
"""SmolLM2-135M but for its widths, on which the number of operations does not depend."""


def test_a_step_at_the_depth_of_smollm2_takes_few_operations_and_waits_once(tmp_path):
    model = _model("llama", **SMOLLM2).bfloat16()
    attend_by_products(model)
    adapted, marks = _adapted(model), []
    groups = arrange({kind: lessons(seed=seed) for seed, kind in enumerate("abcd")}, 32, 0)
    parts = []

    def in_one_row(rows):
        batch = collate(rows, 1000, in_one_row=True)
        parts.append(batch["parts"])
        return batch

    with OperationCounts() as counts, packing(adapted) as can:
        assert can
        fit(
            adapted, groups, Stage(), tmp_path, sequence_loss(WEIGHTS), Schedule(2, 8, 1e-3, 0, save_every=0),
            in_one_row, after_step=lambda step: marks.append((counts.operations, counts.waits)),
        )  # fmt: skip
    (operations, waits), (more, waits_more) = marks
    assert [len(some) for some in parts] == [1, 1] and not any("attention_mask" in some[0] for some in parts)
    # 32 sequences in 8 padded parts took 138,000 operations and 25 waits, and packed by the library's layers 18,000.
    assert 5_000 < more - operations <= 16_500 and waits_more - waits == 1
