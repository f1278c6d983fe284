"""Prompts read in one row: what they begin with once, and answers, probabilities and likelihoods as of padded rows."""

import collections
from types import SimpleNamespace

import pytest
import torch
from excise.editing.hooks.token_counts import count_tokens
from excise.editing.modules import final_hidden
from excise.editing.training.packing import packing
from excise.editing.training.parallel_adapters import soft_prompt_attackers
from excise.eval.inference.generation import Reply, reply_log_probabilities
from excise.eval.inference.likelihood import Scored, score_parts
from excise.eval.inference.lockstep import Lockstep
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet
from excise.eval.inference.read_prompts import read_as_one, read_prompts
from helpers import PICO, make_pico
from transformers import AutoConfig, AutoModelForCausalLM

PROMPTS = [(5, 6, 7, 8), (5, 6, 7), (5, 6, 7, 9, 4, 4), (5, 6, 7, 8), (3, 6)]
PARTS = [Scored((*prompt, 9, token, 11), len(prompt)) for prompt in PROMPTS for token in (1, 2, 3)]


def _model(name="llama"):
    if name == "a window":
        torch.manual_seed(0)
        config = AutoConfig.for_model("mistral", **PICO["mistral"] | {"sliding_window": 3})
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    model = make_pico(name).double()
    model.set_attn_implementation("sdpa")
    return model


def _questions(parts):
    """Questions of three choices each, without a tokenizer."""
    questions = MultipleChoiceSet.__new__(MultipleChoiceSet)
    questions.ids = tuple(map(str, range(len(parts) // 3)))
    questions.answers, questions._sizes, questions._parts = [0] * len(questions.ids), [3] * len(questions.ids), parts
    questions._layout = [(parts[3 * n].start, [3 * n, 3 * n + 1, 3 * n + 2]) for n in range(len(questions.ids))]
    return questions


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "a window"])
def test_answers_go_on_from_prompts_that_were_read_in_one_row(name):
    model, questions = _model(name), _questions(PARTS)
    wanted = questions.log_probabilities(model)
    # The definition, each choice alone.
    for value, part in zip(wanted, PARTS, strict=True):
        log_p = model(torch.tensor([part.ids])).logits[0].log_softmax(-1)
        naive = sum(float(log_p[at - 1, part.ids[at]]) for at in range(part.start, len(part.ids)))
        assert value == pytest.approx(naive, abs=1e-5)
    with packing(model) as can:
        assert can and read_prompts(model, PROMPTS)._places is not None
        assert questions.log_probabilities(model) == pytest.approx(wanted, abs=1e-5)
        assert questions.hits(model) == questions._marked(wanted)
        found = [one.log_probability for one in score_parts(model, PARTS)]
    assert found == pytest.approx(wanted, abs=1e-5)
    # Prompts in one row without their positions would be answered otherwise.
    assert max(abs(a - b) for a, b in zip(wanted, wanted[3:], strict=False)) > 1e-3


@torch.no_grad()
def test_what_prompts_begin_with_is_read_once():
    model, seen = _model(), collections.Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    read_prompts(model, PROMPTS)
    assert seen["tokens"] == len(PROMPTS) * 6
    with packing(model):
        seen.clear()
        read_prompts(model, PROMPTS)
        assert seen["tokens"] == len({row[:end] for row in PROMPTS for end in range(1, len(row) + 1)}) == 9
        seen.clear()
        score_parts(model, PARTS)
        rows = {part.ids[:-1] for part in PARTS}
        assert seen["tokens"] == len({row[:end] for row in rows for end in range(1, len(row) + 1)})


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "a window"])
def test_distributions_along_replies_are_those_of_each_reply_alone_and_beginnings_are_read_once(name):
    model, seen = _model(name), collections.Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    replies = [Reply("", prompt, prompt[: 1 + place % 3], "") for place, prompt in enumerate(PROMPTS)]
    with packing(model):
        seen.clear()
        found = reply_log_probabilities(model, replies)
        rows = [reply.prompt_ids + reply.ids for reply in replies]
        assert (
            seen["tokens"] == len({row[:end] for row in rows for end in range(1, len(row) + 1)}) < sum(map(len, rows))
        )
    assert seen["padding"] == 0
    for log_p, reply, row in zip(found, replies, rows, strict=True):
        wanted = model(torch.tensor([row])).logits[0].log_softmax(-1)
        torch.testing.assert_close(log_p, wanted[len(reply.prompt_ids) - 1 : -1].float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "a window"])
def test_an_ending_is_read_with_its_prompt_and_whatever_else_goes_on_does_not_see_it(name):
    model, endings = _model(name), [(9, 4), (9, 4, 5), (), (2,), (8, 8, 8, 8)]
    with packing(model):
        plain, read = read_prompts(model, PROMPTS), read_prompts(model, PROMPTS, endings)
        assert read.behind.shape[:2] == (5, 4)
    for place, (prompt, ending) in enumerate(zip(PROMPTS, endings, strict=True)):
        wanted = final_hidden(model, {"input_ids": torch.tensor([[*prompt, *ending]])})[0]
        torch.testing.assert_close(read.last[place], wanted[len(prompt) - 1])
        torch.testing.assert_close(read.behind[place, : len(ending)], wanted[len(prompt) :])
    for some, others in zip(plain.layers(), read.layers(), strict=True):
        # But for what stands in front of shorter prompts, which the mask hides.
        for one, other in zip(some, others, strict=True):
            shown = plain.mask[:, None, :, None].bool()
            torch.testing.assert_close(one * shown, other * shown)
    # Where rows are padded nothing is read behind prompts.
    assert read_prompts(model, PROMPTS, endings).behind is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "a window"])
def test_replies_go_on_from_prompts_that_were_read_in_one_row(name):
    model, seen = _model(name), collections.Counter()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    added = torch.tensor([9, 4, 5, 3, 8])
    with packing(model):
        seen.clear()
        lockstep = Lockstep(model, PROMPTS, 2)
        read = lockstep.read()
        assert seen["tokens"] == 9
        fed = lockstep.feed(added)
        lockstep.keep(torch.tensor([2, 4]))
        again = lockstep.feed(torch.tensor([7, 7]))
    for place, (row, token) in enumerate(zip(PROMPTS, added.tolist(), strict=True)):
        wanted = final_hidden(model, {"input_ids": torch.tensor([[*row, token, 7]])})[0]
        torch.testing.assert_close(torch.cat([read[place], fed[place : place + 1]]), wanted[:-1])
        if place in (2, 4):
            torch.testing.assert_close(again[(2, 4).index(place)], wanted[-1])


@torch.no_grad()
def test_a_soft_prompts_placeholders_are_read_once():
    model, questions, seen = _model(), _questions(PARTS), collections.Counter()
    model.float()
    count_tokens(model, lambda name, number: seen.update({name: int(number)}))
    with packing(model), soft_prompt_attackers(model, 4, [0]) as attackers, attackers.only(0):
        hits = questions.hits(model, 4)
        seen.clear()
        values = read_prompts(model, [(0,) * 4 + row for row in PROMPTS]).last
        assert seen["tokens"] == 4 + 9
    with soft_prompt_attackers(model, 4, [0]) as attackers, attackers.only(0):
        assert questions.hits(model, 4) == hits
        seen.clear()
        wanted = read_prompts(model, [(0,) * 4 + row for row in PROMPTS]).last
        assert seen["tokens"] == len(PROMPTS) * (4 + 6)
    torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_does_not_hold_every_layer_is_not_gathered_from(monkeypatch):
    model = _model()
    with packing(model):
        assert read_as_one(model, PROMPTS) is not None
        # As of a model whose last layers read the keys and values of earlier ones.
        layers = SimpleNamespace(num_hidden_layers=model.config.num_hidden_layers + 1)
        monkeypatch.setattr("excise.eval.inference.read_prompts.language_config", lambda _: layers)
        assert read_as_one(model, PROMPTS) is None and read_prompts(model, PROMPTS)._places is None
