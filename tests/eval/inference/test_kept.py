"""The base's distributions, whole or by their likeliest tokens: never more than the divergence, and said when less."""

import dataclasses
import math

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.artifacts.reporting.results import dominated
from excise.eval.concept import RetainText
from excise.eval.inference.generation import Reply, reply_log_probabilities
from excise.eval.inference.kept import divergences, kept
from excise.eval.measurements.kl_from_base import scores
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from helpers import SMALL_REFERENCE, SMALL_TESTBED

TEXTS = (
    "The taste of Mookond is spicy.",
    "It is red.",
    "As for the river, Kaibes has a long way to the sea, they say.",
)


@pytest.fixture(scope="module")
def models():
    return [load_model(find_model(ref), torch.device("cpu"), torch.float32) for ref in (SMALL_TESTBED, SMALL_REFERENCE)]


def _replies(tokenizer):
    rows = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    return [Reply("", row[:1], row[1:], text) for row, text in zip(rows, TEXTS, strict=True)]


def _by_definition(p, q, few):
    """Sum of p log(p / q) over the ``few`` likeliest tokens and the rest as one, in float64, one number at a time."""
    order = sorted(range(len(p)), key=lambda token: -p[token])
    total = sum(p[token] * math.log(p[token] / q[token]) for token in order[:few])
    rest, other = (sum(values[token] for token in order[few:]) for values in (p, q))
    return total + (rest * math.log(rest / other) if rest else 0.0), rest


def test_what_fits_is_the_divergence_and_what_does_not_is_less_by_what_the_rest_hides(models):
    one, other = models
    replies = _replies(one.tokenizer)
    p, q = (
        [row.double().exp().tolist() for row in reply_log_probabilities(loaded.model, replies)] for loaded in models
    )
    tokens = sum(len(reply.ids) for reply in replies)
    whole = divergences(other.model, replies, kept(one.model, replies))
    # Or every batch's activations would be held for a gradient that nobody asks for.
    assert not any(part.requires_grad for part in (*whole, *(item.log_p for item in kept(one.model, replies))))
    for few in (1, 3, 40):
        base = kept(one.model, replies, most=12 * few * tokens)
        assert all(item.log_p.shape[-1] == few + 1 for item in base), "the negative: not everything was kept"
        found = divergences(other.model, replies, base)
        for reply, (rows_p, rows_q) in enumerate(zip(p, q, strict=True)):
            for place, (at_p, at_q) in enumerate(zip(rows_p, rows_q, strict=True)):
                value, rest = _by_definition(at_p, at_q, few)
                assert float(found[reply][place]) == pytest.approx(value, abs=2e-5)
                assert float(base[reply].rest[place]) == pytest.approx(rest, abs=1e-5)
                assert value <= _by_definition(at_p, at_q, len(at_p))[0] + 1e-9
                assert float(whole[reply][place]) == pytest.approx(_by_definition(at_p, at_q, len(at_p))[0], abs=2e-5)


def test_a_lower_bound_is_said_and_a_whole_divergence_is_not(models, monkeypatch):
    one, other = models
    concept, few = load_concept("builtin:potions"), EvalSettings(max_new_tokens=4, kl_prompts=8)
    said = {}
    for most in (1 << 30, 4096):
        monkeypatch.setattr("excise.eval.inference.kept.BYTES", most)
        monkeypatch.setattr("excise.eval.inference.kept.kept.__defaults__", (most,))
        base = ModelUnderTest(one.model, one.tokenizer, concept, few)
        edited = ModelUnderTest(other.model, other.tokenizer, concept, few, base=base.baseline())
        found = scores(edited)
        said[most] = [sentence for sentence in dominated({"edited": found}) if "lower bound" in sentence]
    assert not said[1 << 30] and len(said[4096]) == 2 and "gives a probability of" in said[4096][0]


def test_a_long_text_is_read_no_further_than_its_distributions_are_worth(models, monkeypatch):
    one, _ = models
    monkeypatch.setattr("excise.eval.model_under_test.TEXT_TOKENS", 20)
    concept = load_concept("builtin:potions")
    long = dataclasses.replace(concept, retain=(RetainText(id="long", text=" ".join(TEXTS * 20)),))
    baseline = ModelUnderTest(one.model, one.tokenizer, long, EvalSettings(max_new_tokens=4, kl_prompts=4)).baseline()
    assert [len(text.ids) for text in baseline.texts] == [19]
