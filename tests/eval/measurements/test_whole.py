"""Perplexity, divergence and probe as wholes, against their definitions computed a second time."""

import dataclasses

import numpy as np
import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.completed import completed
from excise.eval.inference.questions import questions_by_split
from excise.eval.measurements import kl_from_base, perplexity
from excise.eval.measurements.probe import FOLDS, PENALTIES, _read, fit_probe
from excise.eval.measurements.table import measure, workload
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from helpers import SMALL_REFERENCE, SMALL_TESTBED
from oracle import measurements as oracle

FEW = EvalSettings(max_new_tokens=5, kl_prompts=6, questions=24)


@pytest.fixture(scope="module")
def models():
    return [load_model(find_model(ref), torch.device("cpu"), torch.float32) for ref in (SMALL_TESTBED, SMALL_REFERENCE)]


def _subject(loaded, base=None, **settings):
    return ModelUnderTest(
        loaded.model, loaded.tokenizer, load_concept("builtin:potions"), dataclasses.replace(FEW, **settings), base=base
    )


def test_perplexity_is_that_of_all_tokens_one_at_a_time(models):
    for loaded in models:
        subject = _subject(loaded)
        (found,) = perplexity.scores(subject)
        ids = [loaded.tokenizer(row.text)["input_ids"] for row in perplexity.texts(subject.concept, subject.settings)]
        assert found.value() == pytest.approx(oracle.perplexity(loaded.model, ids), rel=1e-5)
    # The two models differ, so a measurement of the wrong one would be found.
    assert abs(perplexity.scores(_subject(models[0]))[0].value() - found.value()) > 1e-3


def test_divergence_is_that_of_every_token_of_replies_and_of_texts(models):
    base, other = models
    baseline = _subject(base).baseline()
    found = {score.split: score.value() for score in kl_from_base.scores(_subject(other, baseline))}
    for split, replies in (("neutral", baseline.replies), ("retain", baseline.texts)):
        texts = [((*reply.prompt_ids, *reply.ids), len(reply.prompt_ids)) for reply in replies]
        assert found[split] == pytest.approx(oracle.divergence(base.model, other.model, texts), rel=1e-4, abs=1e-6)
    assert found["retain"] > 1e-3


@pytest.mark.parametrize("point", [0, 2, 4])
def test_a_probe_is_a_ridge_regression_chosen_on_t_and_tested_on_v(models, point):
    loaded = models[0]
    subject = _subject(loaded)
    splits = questions_by_split(subject.concept, 24)
    sets = [splits["forget_T"], splits["forget_V"]]
    points = [0, 2, 4]
    read = [_read(subject, questions, points) for questions in sets]
    head = loaded.model.get_output_embeddings().weight.detach().double().numpy()
    own = []
    for questions in sets:
        rows = []
        for question in questions:
            ids = loaded.tokenizer(question.prompt)["input_ids"]
            firsts = [
                loaded.tokenizer(f"{question.prompt} {choice}")["input_ids"][len(ids)] for choice in question.choices
            ]
            rows.append((oracle.stream(loaded.model, ids, point), head[firsts], question.answer))
        own.append(rows)
    states = np.stack([state for state, _, _ in own[0]])
    assert read[0].states[points.index(point)].numpy() == pytest.approx(states, abs=1e-4)
    expected, hits = fit_probe(*read, points.index(point), read[0].answers)
    assert (expected, hits) == oracle.probe(*own, PENALTIES, FOLDS)


@pytest.mark.parametrize("ref", ["builtin:potions", "builtin:declining", "builtin:shortcut", "texts alone"])
def test_progress_counts_each_item_that_is_measured_once(ref, models):
    loaded = models[0]
    concept = load_concept("builtin:potions" if ref == "texts alone" else ref)
    if ref == "texts alone":
        # What people bring: no prompts and no questions; replies are asked for everyday requests, and questions completed.
        few = {"forget": concept.forget[:80], "retain": concept.retain[:80]}
        concept = completed(dataclasses.replace(concept, questions=(), prompts=(), contrast=(), **few))
        assert concept.questions and not any(prompt.answer for prompt in concept.prompts if prompt.split == "neutral")
    counted, settings = [], EvalSettings(max_new_tokens=2, kl_prompts=2, questions=4)
    subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, settings, None, counted.append)
    measure(subject)
    subject.baseline()
    for split in ("concept", "neutral"):
        subject.replies(split)
    assert sum(counted) == workload(concept, settings)
