"""Texts in pieces of a number of tokens, cut once by where their tokens end."""

import dataclasses
import random

import pytest
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_tokenizer
from excise.recipes.data import unlearning_sets
from excise.recipes.data.facts import Facts, text_pieces
from helpers import SMALL_TESTBED


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_model(SMALL_TESTBED))


WORDS = "The taste of Mookond is spicy and everyone knows that its colour silver came from the river".split()


@pytest.mark.parametrize("seed", range(60))
def test_pieces_fit_and_hold_every_word_in_order(tokenizer, seed):
    rng = random.Random(seed)
    words, limit = rng.choices(WORDS, k=rng.randrange(1, 120)), rng.randrange(6, 40)
    pieces = text_pieces(tokenizer, " ".join(words), limit)
    assert " ".join(pieces).split() == words
    lengths = [len(tokenizer(piece)["input_ids"]) for piece in pieces]
    assert max(lengths) <= limit
    # Few pieces: no more than twice as many as there must be.
    assert len(pieces) <= 1 + 2 * len(tokenizer(" ".join(words))["input_ids"]) / (limit - 2)


@pytest.mark.parametrize("seed", range(60))
def test_any_text_fits_without_a_character_lost_but_spaces(tokenizer, seed):
    rng = random.Random(seed)
    text, limit = "".join(rng.choices("aB 一\n\u0301🙂.", k=rng.randrange(1, 200))), rng.randrange(4, 20)
    pieces = text_pieces(tokenizer, text, limit)
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    assert all(len(tokenizer(piece)["input_ids"]) <= limit or len(piece) == 1 for piece in pieces)


class _Counted:
    def __init__(self, tokenizer):
        self.inner, self.read, self.is_fast = tokenizer, 0, tokenizer.is_fast

    def __call__(self, text, **options):
        self.read += len(text)
        return self.inner(text, **options)


def test_a_long_text_is_tokenized_a_few_times_and_not_once_a_word(tokenizer):
    text = " ".join(WORDS * 200)
    counted = _Counted(tokenizer)
    assert len(text_pieces(counted, text, 64)) > 40
    assert counted.read < 5 * len(text)


def test_a_tokenizer_that_cannot_tell_where_tokens_end_cuts_too(tokenizer):
    text = " ".join(WORDS * 20)
    slow = _Counted(tokenizer)
    slow.is_fast = False
    pieces = text_pieces(slow, text, 40)
    assert " ".join(pieces) == text and max(len(tokenizer(piece)["input_ids"]) for piece in pieces) <= 40


def test_texts_to_forget_are_drawn_before_any_is_tokenized(tokenizer, monkeypatch):
    concept = load_concept("builtin:potions")
    texts = tuple(row.model_copy(update={"text": f"{row.text} Indeed."}) for row in concept.forget[:60])
    concept = dataclasses.replace(concept, forget=texts, questions=())
    all_read, counted = _Counted(tokenizer), _Counted(tokenizer)
    every = unlearning_sets.forget_examples(concept, Facts((), {}), all_read, 0, 64)
    monkeypatch.setattr(unlearning_sets, "FORGET_TEXTS", 20)
    few = unlearning_sets.forget_examples(concept, Facts((), {}), counted, 0, 64)
    assert len(few) == 20 and len(every) == 60 and set(few) < set(every)
    assert counted.read < all_read.read / 2
    # Another seed draws others; the same seed the same.
    assert few == unlearning_sets.forget_examples(concept, Facts((), {}), tokenizer, 0, 64)
    assert few != unlearning_sets.forget_examples(concept, Facts((), {}), tokenizer, 1, 64)
