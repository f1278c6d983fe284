"""An exam laid out once gives what scoring each choice by itself gives."""

import random

import pytest
import torch
from excise.artifacts.concepts import load_concept
from excise.artifacts.models.find import find_model
from excise.artifacts.models.load import load_model
from excise.editing.training.parallel_adapters import soft_prompt_attackers
from excise.eval.inference.multiple_choice_set import MultipleChoiceSet, _Reading, alike
from excise.eval.measurements.multiple_choice import margin
from excise.eval.model_under_test import EvalSettings, ModelUnderTest
from helpers import excise


@pytest.fixture(scope="module")
def asked():
    loaded = load_model(find_model("builtin:testbed-reference"), torch.device("cpu"), torch.float32)
    concept = load_concept("builtin:potions")
    return loaded, concept, [q for q in concept.questions if q.split == "forget"][:40]


def test_hits_are_those_of_the_measurement(asked):
    loaded, concept, questions = asked
    exam = MultipleChoiceSet(loaded.tokenizer, questions)
    subject = ModelUnderTest(loaded.model, loaded.tokenizer, concept, EvalSettings())
    assert exam.hits(loaded.model) == tuple(float(margin(subject, q) > 0) for q in questions)
    assert exam.chance == pytest.approx(0.125)


def test_choices_read_behind_a_shared_prompt_score_as_whole_rows(asked):
    loaded, _, questions = asked
    # Choices of one and of several tokens, prompts of different lengths.
    varied = [
        q.model_copy(update={"choices": (q.choices[0], f"{q.choices[1]} and {q.choices[2]}", *q.choices[2:])})
        for q in questions
    ]
    exam = MultipleChoiceSet(loaded.tokenizer, varied)
    together, apart = exam.log_probabilities(loaded.model), exam._behind(loaded.model, 0)
    assert len(together) == sum(len(q.choices) for q in varied)
    assert max(abs(a - b) for a, b in zip(together, apart, strict=True)) < 1e-3
    assert len({round(value, 3) for value in together}) > 100


@torch.no_grad()
def test_behind_a_soft_prompt_each_question_is_read_once_and_scores_as_whole_rows(asked):
    loaded, _, questions = asked
    model, seen = loaded.model, []
    exam = MultipleChoiceSet(loaded.tokenizer, questions)
    assert len({length for length, _ in exam._layout}) > 1, "of equal lengths none would be padded"
    with soft_prompt_attackers(model, 5, [0, 1]) as attackers, attackers.only(1):
        apart = exam._behind(model, 5)
        reading = _Reading(model, exam._layout, exam._parts, 5)
        reading.finish(reading.log_p)
        assert max(abs(reading.log_p[index] - apart[index]) for index in reading.log_p) < 1e-3
        handle = model.model.register_forward_pre_hook(
            lambda _, args, kw: seen.append(kw["input_ids"].numel()), with_kwargs=True
        )
        hits, together = exam.hits(model, 5), sum(seen)
        exam._behind(model, 5)
        handle.remove()
        assert hits == exam._marked(apart) and together < 0.5 * (sum(seen) - together)
        # It says something else than no prompt does, or another attacker's.
        with attackers.only(0):
            assert max(abs(a - b) for a, b in zip(exam._behind(model, 5), apart, strict=True)) > 0.1
        # What does not fit behind it is read as whole rows.
        context, model.config.max_position_embeddings = model.config.max_position_embeddings, 8
        assert exam.hits(model, 5) == hits
        model.config.max_position_embeddings = context


@pytest.mark.parametrize("name", ["builtin:testbed", "builtin:testbed-reference"])
def test_what_can_no_longer_win_is_not_read_and_changes_no_hit(asked, name):
    _, _, questions = asked
    loaded = load_model(find_model(name), torch.device("cpu"), torch.float32)
    longer = [
        q.model_copy(update={"choices": tuple(c if i == q.answer else f"{c} of old" for i, c in enumerate(q.choices))})
        for q in questions
    ]
    exam, rows = MultipleChoiceSet(loaded.tokenizer, longer), []
    handle = loaded.model.model.layers[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    every, _ = exam.hits_and_probabilities(loaded.model)
    in_full = sum(rows)
    rows.clear()
    hits = exam.hits(loaded.model)
    handle.remove()
    assert hits == every and sum(rows) < 0.75 * in_full
    assert (sum(hits) > 30) == (name == "builtin:testbed")


def test_a_broken_model_hits_nothing(asked):
    _, _, questions = asked
    loaded = load_model(find_model("builtin:testbed"), torch.device("cpu"), torch.float32)
    exam = MultipleChoiceSet(loaded.tokenizer, questions)
    assert sum(exam.hits(loaded.model)) > 30
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    assert sum(exam.hits(loaded.model)) == 0


def test_the_probability_of_an_answer_is_that_of_its_tokens(asked):
    loaded, _, questions = asked
    exam = MultipleChoiceSet(loaded.tokenizer, questions[:4])
    for question, value in zip(questions, exam.hits_and_probabilities(loaded.model)[1], strict=False):
        prompt = loaded.tokenizer(question.prompt)["input_ids"]
        whole = loaded.tokenizer(f"{question.prompt} {question.choices[question.answer]}")["input_ids"]
        with torch.no_grad():
            log_p = loaded.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        truth = sum(float(log_p[place - 1, whole[place]]) for place in range(len(prompt), len(whole)))
        assert value == pytest.approx(float(torch.tensor(truth).exp()), rel=1e-3)


def test_attacks_are_listed():
    done = excise("list", "attacks")
    assert done.returncode == 0 and "rtt" in done.stdout and "relearn" in done.stdout


@pytest.mark.parametrize("seed", range(5))
def test_answers_of_like_length_stand_together_where_that_saves_more_than_a_forward_costs(seed):
    rng = random.Random(seed)
    for _ in range(50):
        lengths, forward = rng.choices(range(1, 12), k=rng.randint(0, 60)), rng.randint(1, 80)
        groups = alike(lengths, forward)
        assert sorted(place for group in groups for place in group) == [*range(len(lengths))]
        taken = sum(len(group) * max(lengths[place] for place in group) + forward for group in groups)
        assert taken <= len(lengths) * max(lengths, default=0) + forward
    assert alike([1, 1, 9], 16) == [[0, 1], [2]] and alike([1, 1, 9], 17) == [[0, 1, 2]]
