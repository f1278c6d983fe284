"""An audit asks what nobody could train on, and every question has one right answer."""

from dataclasses import replace

import pytest
from excise.artifacts.concepts import load_concept
from excise.editing.errors import RequestError
from excise.eval.concept import ForgetText
from excise.recipes.audit.request import check_held_out


@pytest.fixture(scope="module")
def concept():
    return load_concept("builtin:potions")


def _held_out(concept):
    return [q for q in concept.questions if q.split == "forget" and q.group == "V"]


def test_the_built_in_pack_holds_its_questions_out(concept):
    assert len(_held_out(concept)) > 20
    check_held_out(concept, _held_out(concept))


def test_a_question_of_both_groups_is_refused_whatever_its_case_and_spaces(concept):
    asked = _held_out(concept)[0]
    again = asked.model_copy(update={"id": "again", "group": "T", "prompt": f"  {asked.prompt.upper()} "})
    with pytest.raises(RequestError, match=rf"1 questions .* first is {asked.id}, as again"):
        check_held_out(replace(concept, questions=(*concept.questions, again)), _held_out(concept))


def test_a_question_that_a_text_to_train_on_answers_is_refused(concept):
    asked = _held_out(concept)[0]
    text = ForgetText(id="told", group="T", text=f"First. {asked.prompt}  {asked.choices[asked.answer]}, they say.")
    with pytest.raises(RequestError, match=rf"first is {asked.id}, as a text"):
        check_held_out(replace(concept, forget=(*concept.forget, text)), _held_out(concept))
    other = text.model_copy(update={"group": "V"})
    check_held_out(replace(concept, forget=(*concept.forget, other)), _held_out(concept))


def test_choices_that_differ_in_case_alone_are_refused(concept):
    asked = _held_out(concept)[0]
    choices = (asked.choices[0], f"{asked.choices[0].upper()} ", *asked.choices[2:])
    with pytest.raises(RequestError, match=f"differ in case and spaces alone .the first is {asked.id}"):
        check_held_out(concept, [asked.model_copy(update={"choices": choices}), *_held_out(concept)[1:]])
