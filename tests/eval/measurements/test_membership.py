"""Tests of membership against naive computations, and on a model that learned one half of the texts."""

import math
import random
import zlib

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.inference.token_statistics import token_statistics
from excise.eval.measurements.membership import (
    as_auc,
    auc,
    auc_parts,
    min_k,
    min_k_plus_plus,
    priv_leak,
    zlib_ratio,
)
from excise.eval.statistics import Scores
from helpers import SMALL_TESTBED


@pytest.fixture(scope="module")
def small():
    return load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)


def test_every_token_is_read_as_a_plain_forward_in_float64_reads_it(small):
    texts = [row.text for row in load_concept("builtin:potions").retain[:5]] + ["The", ""]
    texts[-1] = " ".join(row.text for row in load_concept("builtin:potions").retain[:120])
    found = token_statistics(small.model, small.tokenizer, texts)
    for text, read in zip(texts[:-2], found, strict=False):
        ids = small.tokenizer(text)["input_ids"]
        with torch.no_grad():
            log_p = small.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place in range(1, len(ids)):
            row = log_p[place - 1]
            mean = sum(float(one.exp() * one) for one in row)
            variance = sum(float(one.exp() * one * one) for one in row) - mean**2
            assert read.log_p[place - 1] == pytest.approx(float(row[ids[place]]), abs=1e-4)
            assert read.mean[place - 1] == pytest.approx(mean, abs=1e-4)
            assert read.deviation[place - 1] == pytest.approx(math.sqrt(variance), abs=1e-3)
    # A text that is longer than the context is read in windows, each token once.
    assert len(found[-1].log_p) == len(small.tokenizer(texts[-1])["input_ids"]) - 1 > 512
    assert found[-2].log_p == () or len(small.tokenizer("The")["input_ids"]) > 1


def test_scores_of_a_text_are_naive_means_of_its_least_likely_tokens():
    rng = random.Random(0)
    for length in (1, 2, 7, 40):
        log_p = [-rng.expovariate(1) for _ in range(length)]
        mean = [-rng.uniform(1, 3) for _ in range(length)]
        deviation = [rng.uniform(0.5, 2) for _ in range(length)]
        for share in (0.1, 0.4, 1.0):
            count = max(1, int(length * share))
            assert min_k(log_p, share) == pytest.approx(sum(sorted(log_p)[:count]) / count)
            z = sorted((p - m) / d for p, m, d in zip(log_p, mean, deviation, strict=True))[:count]
            assert min_k_plus_plus(log_p, mean, deviation, share) == pytest.approx(sum(z) / count)
        expected = sum(log_p) / length / len(zlib.compress(b"some text"))
        assert zlib_ratio(log_p, "some text") == pytest.approx(expected)
    assert math.isfinite(min_k_plus_plus([0.0], [0.0], [0.0]))


def test_the_auc_counts_pairs_and_its_parts_have_the_variance_of_delong():
    rng = random.Random(2)
    members, others = [rng.randint(0, 9) for _ in range(30)], [rng.randint(-3, 6) for _ in range(50)]
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in others]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    parts = auc_parts(members, others)
    assert sum(parts) / len(parts) == pytest.approx(auc(members, others))

    def spread(values):
        mean = sum(values) / len(values)
        return sum((one - mean) ** 2 for one in values)

    by_member = [sum(pairs[50 * i : 50 * i + 50]) / 50 for i in range(30)]
    by_other = [sum(pairs[j::50]) / 30 for j in range(50)]
    delong = spread(by_member) / 30**2 + spread(by_other) / 50**2
    assert spread(parts) / len(parts) ** 2 == pytest.approx(delong)


def test_intervals_of_an_auc_stay_within_their_bounds():
    def scores(values, split):
        ids = tuple(f"{split}{n}" for n in range(len(values)))
        return Scores("membership_min_k", split, "x", "base", ids, tuple(values), (1.0,) * len(values), clusters=ids)

    rng = random.Random(3)
    found = as_auc(
        scores([rng.gauss(2.2, 1) for _ in range(12)], "forget"), scores([rng.gauss(0, 1) for _ in range(12)], "unseen")
    )
    low, high = found.interval()
    assert 0 <= low < found.value() <= high <= 1 and len(found.ids) == 24


def test_privleak_is_minus_100_where_membership_shows_and_0_where_the_reference_stands():
    assert priv_leak(1.0, 0.5) == -100 and priv_leak(0.5, 0.5) == 0
    assert priv_leak(0.0, 0.5) == 100
    # As the benchmark writes it, with A the AUC of the unseen texts as members.
    for model, reference in ((0.93, 0.48), (0.31, 0.55)):
        a, b = 1 - model, 1 - reference
        assert priv_leak(model, reference) == pytest.approx(100 * (a - b) / b)
