"""The same questions in several formats: the base answers, who never knew does not."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.events import Events
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.eval.inference.likelihood import Request, log_likelihoods
from excise.recipes.audit.attack_data import AttackData
from excise.recipes.audit.attackers import AttackTraining
from excise.recipes.audit.attacks.table import ATTACKS, Budget
from excise.recipes.audit.formats import FORMATS, FormatQuestions
from excise.recipes.data.facts import find_facts
from helpers import SMALL_REFERENCE, SMALL_TESTBED


@pytest.fixture(scope="module")
def questions():
    concept = load_concept("builtin:potions")
    return concept, tuple(q for q in concept.questions if q.split == "forget" and q.group == "V")[:24]


def _loaded(name):
    return load_model(find_model(name), torch.device("cpu"), torch.float32)


def test_the_base_answers_in_most_formats_and_who_never_knew_in_none(questions):
    _, asked = questions
    base, never = _loaded(SMALL_TESTBED), _loaded(SMALL_REFERENCE)
    formats = FormatQuestions(asked, base.tokenizer)
    known, guessed = formats.ask(base.model), formats.ask(never.model)
    chances = formats.chances()
    assert set(known) == set(guessed) == set(chances) == set(FORMATS)
    assert all(len(values) == len(asked) for values in (*known.values(), *guessed.values()))
    for name in ("multiple_choice", "cloze", "open_answer", "reversed"):
        assert np.mean(known[name]) > chances[name] + 0.4, name
        assert np.mean(guessed[name]) < chances[name] + 0.25, name


def test_formats_are_those_of_questions_asked_one_by_one(questions):
    """Each request alone, without shared forwards; the softmax by its definition."""
    _, asked = questions
    loaded = _loaded(SMALL_TESTBED)
    formats = FormatQuestions(asked[:12], loaded.tokenizer)
    found = formats.ask(loaded.model)

    def score(prompt, text):
        request = Request(prompt, f" {text}")
        return log_likelihoods(loaded.model, loaded.tokenizer, [request])[request].per_token

    for place, question in enumerate(asked[:12]):
        values = [score(question.prompt, choice) for choice in question.choices]
        share = math.exp(values[question.answer]) / sum(map(math.exp, values))
        assert found["cloze"][place] == pytest.approx(share, abs=1e-4)
        assert found["multiple_choice"][place] == float(int(np.argmax(values)) == question.answer)
        answer = question.choices[question.answer]
        requests = formats.requests[place][2]
        own, others = requests[0], requests[1:]
        assert own.prompt == question.prompt and all(question.subject not in other.prompt for other in others)
        alone = [score(request.prompt, answer) for request in requests]
        assert found["reversed"][place] == float(alone[0] > max(alone[1:]))
        # Who else has the same answer is never taken for a wrong subject.
        for other in asked[:12]:
            if other.prompt in {request.prompt for request in others}:
                assert other.choices[other.answer] != answer


def test_a_question_without_its_subject_cannot_be_reversed(questions):
    _, asked = questions
    loaded = _loaded(SMALL_REFERENCE)
    nameless = tuple(q.model_copy(update={"subject": None}) for q in asked[:3])
    formats = FormatQuestions(nameless, loaded.tokenizer)
    assert all(map(math.isnan, formats.ask(loaded.model)["reversed"])) and math.isnan(formats.chances()["reversed"])


@pytest.mark.parametrize("name", ["rtt", "rtt_full", "soft_prompt"])
def test_formats_are_asked_of_the_attacker_that_got_furthest_as_it_was_then(questions, name, tmp_path):
    concept, asked = questions
    loaded = _loaded(SMALL_TESTBED)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    formats = FormatQuestions(asked, loaded.tokenizer)
    data = AttackData(concept, find_facts(concept), asked, loaded.tokenizer, 0, formats=formats)
    # The first rate destroys, so the best look is not the last one.
    rates = {"low_rank": (3e-1, 1e-4), "all_weights": (1e-1,), "soft_prompt": (1e-1,)}
    budget = Budget((), 4, 1, rates, batch=4)
    with Events().stage("attack") as stage:
        found = AttackTraining(loaded.model, data, budget, tmp_path).curves({name: ATTACKS[name]}, stage)[name]
    if name == "soft_prompt":
        assert found.formats is None
        return
    curves = {rate: curve.accuracy[1:] for rate, curve in found.by_rate.items()}
    best = max(max(values) for values in curves.values())
    steps = next(iter(found.by_rate.values())).steps
    assert curves[found.formats.rate][steps.index(found.formats.step) - 1] == best
    # The same questions, in the same state.
    assert np.mean(found.formats.values["multiple_choice"]) == pytest.approx(best)
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
    none = dataclasses.replace(data, formats=None)
    with Events().stage("attack") as stage:
        plain = AttackTraining(loaded.model, none, budget, tmp_path).curves({name: ATTACKS[name]}, stage)[name]
    assert plain.formats is None
    # Asking formats changes nothing of what attackers learn.
    for rate, curve in plain.by_rate.items():
        assert np.array_equal(curve.hits, found.by_rate[rate].hits)
