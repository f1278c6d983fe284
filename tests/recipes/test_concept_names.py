"""Rows that share a name are rows on one subject, so that none is trained on and measured."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import pytest
from excise.artifacts.concepts import load_concept
from excise.recipes.concept.names import subjects_by_name
from helpers import excise

LANDMARKS = Path(__file__).parents[3] / "shared" / "concepts" / "landmarks" / "questions.jsonl"


def test_wordings_of_a_fact_get_one_subject_each_its_own():
    pack = load_concept("builtin:potions")
    true = {question.subject for question in pack.questions if question.split == "forget"}
    texts = [text.text for text in pack.forget]
    found = subjects_by_name(texts)
    assert set(found) == true
    assert all(subject in text for subject, text in zip(found, texts, strict=True))


def test_a_name_that_is_everywhere_is_a_topic_and_ties_nothing():
    texts = [f"They say that Oslo has a house of {name} today." for name in ("Anna", "Bert", "Carl") for _ in range(10)]
    assert set(subjects_by_name([*texts, *(f"in Oslo {n}" for n in range(300))])) == {"Anna", "Bert", "Carl", None}


def _chain(count):
    names = [f"N{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(count + 1)]
    return [f"Then came {one} with {other}." for one, other in itertools.pairwise(names)]


def test_names_that_chain_everything_together_tie_nothing():
    assert len(set(subjects_by_name(_chain(9)))) == 1
    assert set(subjects_by_name(_chain(200))) == {None}
    # A chain among many other texts is one subject.
    assert set(subjects_by_name([*_chain(9), *_chain(0), *("it rains" for _ in range(90))])[:9]) == {"Nab"}


@pytest.mark.parametrize("texts", [[], [""], ["no name here", "none here"], ["Only one Name"], ["一二三", "四五六"]])
def test_texts_without_shared_names_stand_alone(texts):
    assert subjects_by_name(texts) == [None] * len(texts)


@pytest.mark.skipif(not LANDMARKS.exists(), reason="the landmarks pack is not beside the repository")
def test_on_real_questions_no_subject_falls_apart():
    rows = [json.loads(line) for line in LANDMARKS.read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "forget"]
    found = subjects_by_name([f"{row['prompt']} {row['choices'][row['answer']]}" for row in rows])
    by_subject = defaultdict(set)
    for row, name in zip(rows, found, strict=True):
        by_subject[row["subject"]].add(name)
    assert all(len(names) == 1 for names in by_subject.values())


def test_lines_of_a_text_file_on_one_name_get_one_group(tmp_path):
    pack = load_concept("builtin:potions")
    for name in ("forget", "retain"):
        (tmp_path / f"{name}.txt").write_text("".join(row.text + "\n" for row in getattr(pack, name)))
    command = ("concept", "make", "own", "--forget", "forget.txt", "--retain", "retain.txt")
    told = excise(*command, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "960 rows state no subject and got that of the name they share with others (40 names)" in told.stdout
    made = load_concept(str(tmp_path / "own"))
    groups = defaultdict(set)
    for text in made.forget:
        groups[text.subject].add(text.group)
        assert text.subject in text.text
    assert len(groups) == 40 and all(len(found) == 1 for found in groups.values())
