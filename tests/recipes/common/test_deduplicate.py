"""Retain texts that repeat forget texts are found, counted and left out."""

import dataclasses

import pytest
from excise.artifacts.concepts import load_concept
from excise.editing.errors import RequestError
from excise.eval.concept import RetainText
from excise.recipes.common.deduplicate import without_overlap


@pytest.fixture(scope="module")
def concept():
    return load_concept("builtin:potions")


def _with(concept, *texts):
    rows = tuple(RetainText(id=f"more-{place}", text=text) for place, text in enumerate(texts))
    return dataclasses.replace(concept, retain=(*concept.retain, *rows))


def test_a_pack_without_overlap_is_left_alone(concept):
    same, warnings = without_overlap(concept)
    assert same is concept and warnings == ()


def test_exact_and_near_duplicates_are_left_out_and_counted(concept):
    text = max((text.text for text in concept.forget), key=len)
    long = " ".join(f"word{place}" for place in range(30))
    forget = (*concept.forget, concept.forget[0].model_copy(update={"id": "long", "text": long}))
    changed = dataclasses.replace(
        _with(concept, text.upper() + "!", long.replace("word29", "other"), "Nothing of the kind stands here at all."),
        forget=forget,
    )
    clean, (said,) = without_overlap(changed)
    assert {text.id for text in changed.retain} - {text.id for text in clean.retain} == {"more-0", "more-1"}
    assert f"2 of {len(changed.retain)} retain texts" in said and "1 exactly, 1 nearly" in said


def test_nothing_left_to_retain_is_refused(concept):
    only = dataclasses.replace(
        concept, retain=tuple(RetainText(id=text.id, text=text.text) for text in concept.forget[:5])
    )
    with pytest.raises(RequestError, match="every retain text of concept builtin:potions repeats"):
        without_overlap(only)
