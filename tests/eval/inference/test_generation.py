"""Replies are the model's own, whatever its generation_config asks for, and keep within its context."""

import copy
from types import SimpleNamespace

import pytest
import torch
from excise.editing.errors import ExciseError, RequestError
from excise.eval.inference import generation
from excise.eval.inference.generation import (
    encode_prompt,
    end_tokens,
    generate,
    plain_decoding,
    reply_log_probabilities,
    set_aside,
)
from excise.eval.inference.lockstep import Lockstep, goes_on_in_step
from helpers import PICO, make_pico
from oracle.language import greedy, log_probabilities
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

PROMPTS = ["5 9 7 3 11", "40 41", "60 61 62 63 64 65 66 67"]
SHIPPED = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "num_beams": 3,
    "suppress_tokens": [5, 6, 7, 8],
    "begin_suppress_tokens": [9, 10],
    "sequence_bias": [[[11], -50.0]],
    "forced_eos_token_id": 3,
    "min_new_tokens": 6,
    "length_penalty": 4.0,
    "num_return_sequences": 1,
    "return_dict_in_generate": True,
    "output_scores": True,
    "stop_strings": ["a"],
    "max_length": 3,
    "temperature": 0.01,
    "top_k": 3,
    "top_p": 0.1,
    "min_p": 0.5,
    "typical_p": 0.2,
    "prompt_lookup_num_tokens": 2,
    "use_cache": False,
}


class _Words:
    """A tokenizer without padding, end and template: one token a word."""

    chat_template = pad_token_id = eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def loaded():
    """A random model, which is sure of nothing."""
    return SimpleNamespace(model=make_pico("llama"), tokenizer=_Words())


@pytest.fixture(scope="module")
def wanted(loaded):
    """What the model itself says, token by token."""
    ends = end_tokens(loaded.model, loaded.tokenizer)
    return [greedy(loaded.model, encode_prompt(loaded.tokenizer, prompt), 10, ends) for prompt in PROMPTS]


def _shipping(loaded, **options):
    """The model with a generation_config that asks for more."""
    model = copy.copy(loaded.model)
    model.generation_config = GenerationConfig(**{**loaded.model.generation_config.to_diff_dict(), **options})
    return model


@pytest.mark.parametrize("option", SHIPPED)
def test_a_greedy_reply_is_the_argmax_of_every_step_whatever_is_shipped(loaded, wanted, option):
    model = _shipping(loaded, **{option: SHIPPED[option]})
    shipped = model.generation_config
    assert [list(reply.ids) for reply in generate(model, loaded.tokenizer, PROMPTS, 10)] == wanted
    assert model.generation_config is shipped and getattr(shipped, option) == SHIPPED[option]


def test_left_to_itself_transformers_obeys_what_is_shipped(loaded, wanted):
    """The fault that this guards against: the same call without the plain configuration."""
    model = _shipping(loaded, repetition_penalty=1.3)
    ids = torch.tensor([encode_prompt(loaded.tokenizer, PROMPTS[2])])
    told = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert told[0, ids.shape[1] :].tolist() != wanted[2]


def test_what_is_shipped_is_back_after_an_error(loaded):
    model = _shipping(loaded, num_beams=3)
    with pytest.raises(ZeroDivisionError), plain_decoding(model, {2}):
        assert model.generation_config.num_beams in (None, 1)
        raise ZeroDivisionError
    assert model.generation_config.num_beams == 3


@pytest.mark.parametrize("seed", [None, 4])
def test_replies_do_not_depend_on_what_is_read_beside_them(loaded, monkeypatch, seed):
    """Rows that have ended leave their batch; what is drawn for a prompt is drawn before it has a batch."""
    prompts, model = [f"{3 + 7 * i % 80} {i + 5}" for i in range(24)], _shipping(loaded, eos_token_id=list(range(40)))
    left = []
    keep = Lockstep.keep
    monkeypatch.setattr(Lockstep, "keep", lambda self, places: (left.append(len(places)), keep(self, places))[1])
    together = generate(model, loaded.tokenizer, prompts, 12, sample_seed=seed)
    assert left and max(left) <= 12, "no batch became smaller"
    monkeypatch.setattr(generation, "tokens_of_replies", lambda *_: 40)
    apart = generate(model, loaded.tokenizer, prompts, 12, sample_seed=seed)
    assert [reply.ids for reply in together] == [reply.ids for reply in apart]
    assert len({len(reply.ids) for reply in together}) > 2
    assert all(set(reply.ids[:-1]).isdisjoint(range(40)) for reply in together)
    if seed is None:
        ends = set(range(40))
        assert [list(one.ids) for one in together] == [greedy(model, one.prompt_ids, 12, ends) for one in together]


def test_models_that_turn_a_position_otherwise_in_longer_rows_are_left_to_the_library(loaded):
    turned = copy.copy(loaded.model)
    turned.config = copy.deepcopy(loaded.model.config)
    assert goes_on_in_step(turned)
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_type": "longrope"}
    assert not goes_on_in_step(turned)
    turned.config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": None}
    assert not goes_on_in_step(turned)


def test_samples_are_drawn_from_the_models_own_distribution(loaded):
    shipped = _shipping(loaded, temperature=0.01, top_k=2, top_p=0.1, min_p=0.5, repetition_penalty=1.3)
    drawn = [
        [reply.ids for reply in generate(model, loaded.tokenizer, PROMPTS[:1] * 400, 1, sample_seed=3)]
        for model in (loaded.model, shipped)
    ]
    assert drawn[0] == drawn[1]
    # Held against the softmax: the likeliest token comes as often as it should, within four standard deviations.
    likely = log_probabilities(loaded.model, encode_prompt(loaded.tokenizer, PROMPTS[0]))
    token = max(range(len(likely)), key=likely.__getitem__)
    share = float(torch.tensor(likely[token]).exp())
    count = sum(ids == (token,) for ids in drawn[0])
    assert abs(count - 400 * share) <= 4 * max(1.0, (400 * share * (1 - share)) ** 0.5)
    assert len(set(drawn[0])) > 5


def test_nothing_is_drawn_from_probabilities_that_are_none(loaded):
    broken = copy.deepcopy(loaded.model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[7, 0] = torch.nan
    with pytest.raises(ExciseError, match="no reply can be drawn"):
        generate(broken, loaded.tokenizer, PROMPTS, 3, sample_seed=1)


def _absolute(**options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**{**PICO["gpt2"], "n_positions": 16, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def test_prompt_and_reply_keep_within_the_context_and_a_long_prompt_loses_its_beginning():
    model = _absolute(bos_token_id=None, eos_token_id=None)
    prompts = [" ".join(str(3 + (i * 7) % 80) for i in range(length)) for length in (4, 12, 13, 40)]
    replies = generate(model, _Words(), prompts, 4)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = [int(word) for word in prompt.split()][-12:]
        assert list(reply.prompt_ids) == ids and list(reply.ids) == greedy(model, ids, 4, set())
    # They can be read again at every token, as the divergence from the base does.
    assert [len(row) for row in reply_log_probabilities(model, replies)] == [4] * 4
    (long,) = generate(model, _Words(), prompts[:1], 99)
    assert len(long.prompt_ids) + len(long.ids) == 16


def test_without_a_padding_token_batches_are_what_single_prompts_are():
    model = _absolute(bos_token_id=None, eos_token_id=None)
    prompts = ["7 8 9", "4", "60 61 62 63 64 65"]
    together = generate(model, _Words(), prompts, 5)
    assert [reply.ids for reply in together] == [generate(model, _Words(), [p], 5)[0].ids for p in prompts]


def test_what_a_generation_config_asks_for_is_named_and_can_be_decoded_with(loaded):
    model = copy.deepcopy(loaded.model)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    assert set_aside(model) == {}
    plain = generate(model, loaded.tokenizer, PROMPTS, 6)
    assert [one.ids for one in generate(model, loaded.tokenizer, PROMPTS, 6, as_shipped=True)] == [o.ids for o in plain]
    model.generation_config = GenerationConfig(
        eos_token_id=2, suppress_tokens=[plain[0].ids[0]], return_dict_in_generate=True
    )
    assert set_aside(model) == {"suppress_tokens": [plain[0].ids[0]]}
    assert [one.ids for one in generate(model, loaded.tokenizer, PROMPTS, 6)] == [one.ids for one in plain]
    shipped = generate(model, loaded.tokenizer, PROMPTS, 6, as_shipped=True)
    assert plain[0].ids[0] not in {token for reply in shipped for token in reply.ids}
    model.generation_config = GenerationConfig(eos_token_id=2, do_sample=True, temperature=5.0)
    twice = [[one.ids for one in generate(model, loaded.tokenizer, PROMPTS, 6, as_shipped=True)] for _ in range(2)]
    assert twice[0] == twice[1] != [one.ids for one in plain]


def test_a_prompt_without_a_token_is_refused_and_named(loaded):
    with pytest.raises(RequestError, match="prompt 2 of 3 holds no token"):
        generate(loaded.model, loaded.tokenizer, ["5 9", "", "7"], 3)
    begins = SimpleNamespace(model=loaded.model, tokenizer=_Begins())
    assert len(generate(begins.model, begins.tokenizer, [""], 3)) == 1


class _Begins(_Words):
    def __call__(self, text, add_special_tokens=True):
        words = [int(word) if word.isdigit() else 3 for word in text.split()]
        return {"input_ids": [1] * add_special_tokens + words}
