"""An audit asks what nobody could train on, and every question has one right answer."""

from dataclasses import replace

import pytest
from excise.artifacts.concepts import load_concept
from excise.editing.errors import RequestError
from excise.eval.concept import ForgetText
from excise.recipes.audit import held_apart as module
from excise.recipes.audit.held_apart import NamesIn, held_apart


@pytest.fixture(scope="module")
def concept():
    return load_concept("builtin:potions")


def _of_v(concept):
    return [q for q in concept.questions if q.split == "forget" and q.group == "V"]


def _groups(apart):
    return {text.id: text.group for text in apart.concept.forget}


def test_the_built_in_pack_holds_its_questions_out(concept):
    apart = held_apart(concept)
    assert list(apart.questions) == _of_v(concept) and len(apart.questions) > 20
    assert apart.concept == concept and apart.notes == ()


def test_a_question_of_both_groups_is_not_asked_whatever_its_case_and_spaces(concept):
    asked = _of_v(concept)[0]
    again = asked.model_copy(update={"id": "again", "group": "T", "prompt": f"  {asked.prompt.upper()} "})
    apart = held_apart(replace(concept, questions=(*concept.questions, again)))
    assert list(apart.questions) == _of_v(concept)[1:]
    assert apart.notes[0].startswith(f"not asked: 1 of {len(_of_v(concept))} questions of group V, which group T has")
    # The same words with another answer ask something else, as "Which of these is true?" does.
    other = again.model_copy(update={"answer": (asked.answer + 1) % len(asked.choices)})
    assert list(held_apart(replace(concept, questions=(*concept.questions, other))).questions) == _of_v(concept)


@pytest.mark.parametrize("subjects", [True, False])
def test_a_text_to_train_on_that_tells_what_is_asked_counts_as_one_about_v(concept, subjects):
    """By the subject that it names; where questions name none, by the question with its answer."""
    asked = _of_v(concept)[0]
    told = f"First. {asked.prompt}  {asked.choices[asked.answer]}, they say."
    if not subjects:
        unnamed = [q.model_copy(update={"subject": None}) for q in concept.questions]
        concept = replace(concept, questions=tuple(unnamed))
    texts = [ForgetText(id="told", group="T", text=told)]
    texts += [ForgetText(id="part", group="T", text=f"Not{asked.subject} is another, and so is {asked.subject}ish.")]
    apart = held_apart(replace(concept, forget=(*concept.forget, *texts)))
    assert _groups(apart)["told"] == "V" and _groups(apart)["part"] == "T"
    assert (
        len(apart.notes) == 1
        and "1 of 482 texts of group T, for naming or answering what group V asks" in apart.notes[0]
    )
    assert list(apart.questions) == [q for q in concept.questions if q.split == "forget" and q.group == "V"]


def test_choices_that_differ_in_case_alone_are_refused(concept):
    asked = _of_v(concept)[0]
    choices = (asked.choices[0], f"{asked.choices[0].upper()} ", *asked.choices[2:])
    changed = [q.model_copy(update={"choices": choices}) if q is asked else q for q in concept.questions]
    with pytest.raises(RequestError, match=f"differ in case and spaces alone .the first is {asked.id}"):
        held_apart(replace(concept, questions=tuple(changed)))


def test_of_many_texts_some_are_read_and_that_is_said(concept, monkeypatch):
    monkeypatch.setattr(module, "MOST_TEXTS", 100)
    apart = held_apart(concept)
    assert len(apart.concept.forget) == 200 and len(apart.notes) == 2
    assert apart.notes[0] == "100 of 480 texts of group T are read, drawn at random"
    assert held_apart(concept).concept == apart.concept


def test_names_are_found_whole_and_the_longest_alone():
    named = NamesIn(["Ada", "Ada Lovelace", "New York", "Turing"])
    assert named("Canada and Adam know ADA LOVELACE, not Alan.") == ["Ada Lovelace"]
    assert sorted(named("Ada met turing in York.")) == ["Ada", "Turing"]
    assert named("") == [] and NamesIn([])("Ada") == []
