"""How a target answers questions whose choices begin alike, are passages, or cannot be scored at all."""

import math
from dataclasses import replace

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.training.edited_target import TargetEdit
from excise.eval.concept import PERSONAS, Question
from excise.eval.inference.likelihood import Request, encode_request
from excise.recipes.common.tokens import encode
from excise.recipes.data.facts import Context, Facts, find_facts
from excise.recipes.elm.contrast import PersonaContrast, contrast_sources
from excise.recipes.elm.erasure import Erasure
from excise.recipes.elm.recipe import ElmSettings
from excise.recipes.elm.story import _target_section
from excise.recipes.elm.target_check import UNCHECKED, check_target
from excise.recipes.elm.target_scores import read_questions, scored
from excise.recipes.elm.teacher import Teacher
from helpers import SMALL_TESTBED

STRENGTHS = (0.0, 7.5)


@pytest.fixture(scope="module")
def loaded():
    return load_model(find_model(SMALL_TESTBED), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def concept():
    return load_concept("builtin:potions")


@pytest.fixture(scope="module")
def erasure(loaded, concept):
    return Erasure(Teacher(loaded.model), loaded.tokenizer, concept, Facts((), {}), ElmSettings())


@pytest.fixture(scope="module")
def source(loaded):
    return PersonaContrast(loaded.tokenizer, PERSONAS.experts("potions"), PERSONAS.novices("potions"))


def _question(name, choices, answer=0, prompt="Question: What is the taste of Barund? Answer:"):
    return Question(id=name, split="forget", group="T", prompt=prompt, choices=choices, answer=answer)


ALIKE = _question("alike", ("sweet and red", "sweet and blue", "sweet"), 1)
PASSAGES = _question(
    "passages", ("it is found in the deep forest by the river", "nobody knows where this one was seen last year")
)
SHORT = _question("short", ("sweet", "bitter", "minty"), 2)


def _naive(loaded, source, question, strength, turn, whole):
    """Per choice the log-probability under the target: one token, one forward and one persona at a time, in float64."""
    model, tokenizer = loaded.model, loaded.tokenizer
    context = Context(question.prompt)
    expert, novice = (
        encode(tokenizer, context.introduced(personas[turn % len(personas)]), True)
        for personas in (source.experts, source.novices)
    )
    sums, lengths, greedy = [], [], []
    for choice in question.choices:
        parts = encode_request(tokenizer, Request(question.prompt, f" {choice}"))
        bare, answer = parts.ids[: parts.start], parts.ids[parts.start :]
        total, said = 0.0, True
        for place in range(len(answer) if whole else 1):
            streams = []
            for row in (bare, expert, novice):
                with torch.no_grad():
                    logits = model(torch.tensor([[*row, *answer[:place]]])).logits[0, -1]
                streams.append(logits.double().log_softmax(-1))
            target = (streams[0] + strength * (streams[2] - streams[1])).exp()
            target = target / target.sum()
            total += math.log(target[answer[place]])
            said &= int(target.argmax()) == answer[place]
        sums.append(total)
        lengths.append(len(answer) if whole else 1)
        greedy.append(said)
    return sums, lengths, greedy


@pytest.mark.parametrize(
    ("question", "whole"), [(ALIKE, True), (PASSAGES, True), (SHORT, False)], ids=lambda part: getattr(part, "id", "")
)
def test_a_choice_has_the_likelihood_of_its_tokens_under_the_target(loaded, erasure, source, question, whole):
    """Asked twice, each time behind another wording of the personas."""
    asked = [question, question.model_copy(update={"id": "again"})]
    readings = read_questions(erasure, [source], asked)[source.name]
    assert [reading.whole for reading in readings] == [whole, whole]
    answers = scored(erasure.teacher, readings, [TargetEdit(strength) for strength in STRENGTHS])
    for turn, of_question in enumerate(answers):
        for strength, answered in zip(STRENGTHS, of_question, strict=True):
            sums, lengths, greedy = _naive(loaded, source, question, strength, turn, whole)
            means = [total / length for total, length in zip(sums, lengths, strict=True)]
            assert answered.right == (means.index(max(means)) == question.answer)
            assert answered.greedy == greedy[question.answer]
            assert math.log(answered.probability) == pytest.approx(sums[question.answer], rel=1e-4, abs=1e-3)
    # The two wordings differ, or nothing would show that they are taken in turn.
    first, second = (math.log(of_question[1].probability) for of_question in answers)
    assert first != pytest.approx(second, rel=1e-3)


def test_choices_that_begin_alike_are_told_apart_and_none_is_dropped(loaded, concept, erasure):
    """Each question's own answer stands against two that share its first token, of which one is nonsense behind it."""
    questions = [
        question.model_copy(
            update={"choices": (right := question.choices[question.answer], f"{right} taste", f"{right}s"), "answer": 0}
        )
        for question in concept.questions
        if question.split == "forget" and question.group == "T"
    ]
    others = tuple(q for q in concept.questions if q.split == "retain")
    same = replace(concept, questions=(*questions, *others))
    check = check_target(replace(erasure, concept=same, facts=find_facts(same)), _sources(erasure, same), (0.0, 1.5))
    assert check.n["forget"] == min(len(questions), 80) and not check.left_out
    assert check.curve[0].accuracy["forget"] > 0.5


def _sources(erasure, concept):
    return contrast_sources(replace(erasure, concept=concept, facts=find_facts(concept)))


def test_questions_that_do_not_fit_the_model_are_counted_and_shown(erasure, concept, source):
    fitting = [q for q in concept.questions if q.group == "T" and q.split in ("forget", "retain")]
    long = _question("long", ("sweet", "bitter"), prompt=" ".join(["the taste of Barund"] * 400))
    pack = replace(concept, questions=(*fitting[:12], *[q for q in fitting if q.split == "retain"][:8], long))
    check = check_target(replace(erasure, concept=pack), [source], (0.0, 1.5))
    assert check.left_out == {"forget": 1}
    (about,) = _target_section(check.describe()).paragraphs
    assert "could not be scored: forget 1" in about


def test_without_a_forget_question_of_group_t_texts_stand_in_and_group_v_is_not_asked(erasure, concept, source):
    only_v = tuple(
        q.model_copy(update={"group": "V"}) if q.split == "forget" else q for q in concept.questions[:40]
    ) + tuple(q for q in concept.questions if q.split == "retain")
    pack = replace(concept, questions=only_v)
    check = check_target(replace(erasure, concept=pack), [source], (0.0, 1.5))
    assert check.made_of == "texts" and check.n["forget"] == 80 and not check.unchecked
    texts_of_v = replace(pack, forget=tuple(row for row in concept.forget if row.group == "V"))
    check = check_target(replace(erasure, concept=texts_of_v), [source])
    assert check.curve == () and not check.separates and check.chance is None
    assert check.best.strength == UNCHECKED["personas"] and "could not be checked" in check.unchecked
    assert "strength 500" in _target_section(check.describe()).paragraphs[0]
    asked = replace(erasure, concept=texts_of_v).at(3.0)
    assert check_target(asked, [source]).best.strength == 3.0
