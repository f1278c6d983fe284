"""Likelihoods are those of one item at a time, with the most context that fits; nothing to score is no score."""

import pytest
import torch
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.errors import RequestError
from excise.eval.concept import ContrastPair, Question
from excise.eval.inference.candidates import KnowledgeProbe
from excise.eval.inference.likelihood import Request, Scored, log_likelihoods, windows
from helpers import SMALL_TESTBED, make_pico
from oracle.language import log_likelihood


class _Words:
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}


def _words(*ids):
    return "".join(f" {token}" for token in ids)


@pytest.fixture
def model():
    # 64 positions; a learned table of positions makes every shift of a window visible.
    return make_pico("gpt2")


@pytest.mark.parametrize(("prompt", "answer"), [(3, 2), (60, 4), (62, 3), (80, 3), (200, 30)])
def test_a_short_continuation_is_read_with_all_the_context_that_fits(model, prompt, answer):
    ids = [3 + (i * 13) % 90 for i in range(prompt + answer)]
    request = Request(_words(*ids[:prompt]), _words(*ids[prompt:]))
    (found,) = log_likelihoods(model, _Words(), [request]).values()
    # One window holds it: the last 64 tokens before the last one.
    begin = max(0, len(ids) - 65)
    wanted = log_likelihood(model, ids[begin:], prompt - begin)
    assert found.tokens == answer and found.log_probability == pytest.approx(wanted, abs=1e-4)


def test_one_token_more_than_the_context_is_not_cut(model):
    ids = [3 + (i * 13) % 90 for i in range(65)]
    (found,) = log_likelihoods(model, _Words(), [Request("", _words(*ids))]).values()
    assert found.log_probability == pytest.approx(log_likelihood(model, ids, 1), abs=1e-4)
    assert found.tokens == 64


@pytest.mark.parametrize("context", [1, 2, 5, 8])
def test_every_scored_token_is_in_one_window_and_has_at_least_half_a_context(context):
    for length in range(1, 40):
        for start in range(1, length + 1):
            ids = tuple(range(length))
            parts = windows(Scored(ids, start), context)
            assert [token for part in parts for token in part.ids[part.start :]] == list(ids[start:])
            for part in parts:
                assert 1 <= part.start < len(part.ids) <= context + 1
                for place in range(part.start, len(part.ids)):
                    # Tokens are their own places in the text.
                    assert place >= min(part.ids[place], context - max(1, context // 2) + 1)


def test_a_text_of_one_token_has_no_score_and_leaves_the_others_alone(model):
    texts = [_words(5), _words(7, 8, 9), _words(11)]
    found = log_likelihoods(model, _Words(), [Request("", text) for text in texts])
    assert [found[Request("", text)].tokens for text in texts] == [0, 2, 0]
    wanted = log_likelihood(model, [7, 8, 9], 1)
    assert found[Request("", texts[1])].log_probability == pytest.approx(wanted, abs=1e-4)


def test_a_contrast_of_one_token_is_left_out_of_the_preference_and_cannot_stand_alone():
    loaded = load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)
    question = Question(id="q", split="forget", group="T", prompt="The town of", choices=("Ruly", "Veel"), answer=0)
    long = ContrastPair(id="1", positive="The expert tells of it", negative="The novice tells of it")
    short = ContrastPair(id="2", positive="The", negative="The")
    alone, both = (
        KnowledgeProbe(loaded.model, loaded.tokenizer, pairs, [question]) for pairs in ([long], [long, short])
    )
    assert both.preference == pytest.approx(alone.preference) != 0
    with pytest.raises(RequestError, match="is a single token"):
        KnowledgeProbe(loaded.model, loaded.tokenizer, [short], [question])
