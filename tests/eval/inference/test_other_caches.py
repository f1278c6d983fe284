"""Models whose layers keep more than keys and values: nothing that is read through a cache may differ for it."""

from typing import Any

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.source import BUILTIN
from excise.editing.modules import final_hidden, unembedding
from excise.editing.wiring import small_copy
from excise.eval.inference.caches import repeats_cache, takes_cache
from excise.eval.inference.generation import generate
from excise.eval.inference.lockstep import Lockstep, goes_on_in_step
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from excise.recipes.common.prefix_cache import final_hidden_states
from oracle.language import greedy
from transformers import AutoConfig, AutoTokenizer

KINDS = {
    "smollm3": ({}, True, True),
    "qwen3_5_text": ({}, True, False),
    "lfm2": ({"num_hidden_layers": 8, "full_attn_idxs": [2, 5]}, True, False),
    "mamba2": ({}, False, False),
}
"""Options, and whether the model reads on from a cache, and whether that can be given to other rows."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUILTIN / "testbed")


def model_of(name: str, tokenizer: Any) -> Any:
    full = AutoConfig.for_model(name, **KINDS[name][0])
    config = small_copy.small_config(full.to_dict())
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.bos_token_id, config.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    torch.manual_seed(0)
    model = small_copy.model_class(full.to_dict())._from_config(config, dtype=torch.float32)
    small_copy._perturb(model)
    return model.eval()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_what_a_cache_can_do_is_found_out(name, tokenizer):
    model = model_of(name, tokenizer)
    assert (takes_cache(model), repeats_cache(model)) == KINDS[name][1:]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_choices_have_the_probabilities_of_rows_read_one_by_one(name, tokenizer):
    model, questions = model_of(name, tokenizer), load_concept("builtin:potions").questions[:6]
    exam = MultipleChoiceSet(tokenizer, questions)
    expected = []
    with torch.no_grad():
        for part in exam._parts:
            ids = torch.tensor([part.ids])
            log_p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            expected.append(sum(float(log_p[at - 1, part.ids[at]]) for at in range(part.start, len(part.ids))))
    assert exam.log_probabilities(model) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_rows_that_begin_alike_have_the_states_of_rows_read_one_by_one(name, tokenizer):
    model = model_of(name, tokenizer)
    shared = tuple(range(20, 60)) * 8
    rows = {(*shared, 70 + index, *range(80, 84 + index)): 2 for index in range(4)}
    for row, states in final_hidden_states(model, rows):
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            alone = final_hidden(model, inputs)[0, -2:]
        assert torch.dist(states, alone) < 2e-4 * alone.norm()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_decoding_token_by_token_gives_the_states_of_whole_rows(name, tokenizer):
    """Rows of unequal length, padded on the left; one of them goes on alone."""
    model, rows = model_of(name, tokenizer), [tuple(range(20, 33)), tuple(range(40, 47))]
    head = unembedding(model)
    with torch.no_grad():
        lockstep = Lockstep(model, rows, 3)
        first, second = lockstep.read(), lockstep.feed(torch.tensor([50, 51]))
        lockstep.keep(torch.tensor([1]))
        third = lockstep.feed(torch.tensor([52]))
        for place, (row, token) in enumerate(zip(rows, (50, 51), strict=True)):
            logits = model(input_ids=torch.tensor([[*row, token]]), use_cache=False).logits[0]
            ours = head(torch.cat([first[place], second[place : place + 1]]))
            assert torch.dist(ours, logits) < 5e-4 * logits.norm()
        alone = model(input_ids=torch.tensor([[*rows[1], 51, 52]]), use_cache=False).logits[0, -1]
        assert torch.dist(head(third)[0], alone) < 5e-4 * alone.norm()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_replies_are_the_argmax_of_whole_rows(name, tokenizer):
    model = model_of(name, tokenizer)
    assert goes_on_in_step(model) == KINDS[name][1]
    replies = generate(model, tokenizer, ["the tea", "a potion is made of leaves", "where"], 5, chat=False)
    for reply in replies:
        assert list(reply.ids) == greedy(model, reply.prompt_ids, 5, {tokenizer.eos_token_id})
