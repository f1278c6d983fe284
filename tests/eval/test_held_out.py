"""What should stay is measured on what no training sees."""

import dataclasses

import pytest
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_tokenizer
from excise.artifacts.reporting.results import measured_on as said
from excise.eval.inference.questions import questions_by_split
from excise.eval.items import clusters_of, for_training, held_out_texts, measured_on, unseen
from excise.eval.measurements.perplexity import texts
from excise.eval.model_under_test import EvalSettings
from excise.recipes.common import adapter_job
from excise.recipes.data.unlearning_sets import retain_examples
from excise.recipes.elm.request import ElmSettings
from helpers import SMALL_TESTBED


@pytest.fixture(scope="module")
def concept():
    return load_concept("builtin:potions")


def test_no_retain_text_that_is_measured_is_trained_on(concept, tmp_path):
    settings = ElmSettings(model=SMALL_TESTBED, concept="builtin:potions", out=tmp_path / "elm")
    job = adapter_job.prepare("elm", settings, resume=False)
    measured = {text.text for text in texts(job.run.concept, EvalSettings())}
    trained = {text.text for text in job.concept.retain}
    assert len(measured) == 320 and len(trained) == 960 and not measured & trained
    tokenizer = load_tokenizer(find_model(SMALL_TESTBED))
    rows = {example.ids for example in retain_examples(job.concept, tokenizer, 0, 256)}
    encoded = {tuple(tokenizer(text)["input_ids"]) for text in measured}
    # The pack as it is would teach all of them.
    assert not rows & encoded
    assert encoded <= {example.ids for example in retain_examples(concept, tokenizer, 0, 256)}


def test_what_is_held_out_is_whole_subjects_that_no_trained_question_names(concept):
    held_out = set(clusters_of(concept, held_out_texts(concept)))
    assert not held_out & set(clusters_of(concept, for_training(concept).retain))
    assert not held_out & {question.subject for question in concept.questions if question.group == "T"}
    assert held_out_texts(concept) == held_out_texts(load_concept("builtin:potions"))


def test_questions_on_what_should_stay_are_those_of_group_v(concept):
    by_split = questions_by_split(concept)
    assert {q.group for split in ("neighbour", "retain") for q in by_split[split]} == {"V"}
    assert len(by_split["neighbour"]) == 80 and len(by_split["retain"]) == 240
    assert len(by_split["forget_T"]) == 80, "what should go is measured in both groups"
    of_t = [question for question in concept.questions if question.group == "T"]
    assert unseen(of_t) == of_t


def test_a_small_pack_is_measured_on_all_that_it_has_and_says_so(concept):
    few = dataclasses.replace(
        concept,
        retain=concept.retain[:39],
        questions=tuple(q for q in concept.questions if q.group == "T" or q.split == "forget"),
    )
    assert held_out_texts(few) == few.retain == for_training(few).retain
    assert said({"measured_on": measured_on(few)}) == (
        "The pack is too small to hold any out of these, which training may see: all 80 neighbour questions, all 240 retain"
        " questions, all 39 retain texts."
    )
    assert said({"measured_on": measured_on(concept)}) == (
        "What should stay is measured on what no training sees: 80 of 160 neighbour questions, 240 of 480 retain questions,"
        " 320 of 1280 retain texts."
    )
    assert said({}) == "", "files of earlier versions"
