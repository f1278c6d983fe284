"""Packs of the built-in world in the shapes of four benchmarks.

python tests/suite_packs.py FOLDER writes one folder each: tofu, muse, wmdp, rwku.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from excise.artifacts.concepts import load_concept
from excise.eval.completed import bare
from excise.eval.concept import Concept, Question

Row = dict[str, Any]
SHAPES = ("tofu", "muse", "wmdp", "rwku")


def write_pack(folder: Path, suite: str | None, files: Mapping[str, Iterable[Row]]) -> Path:
    """A pack of rows, each file with one line a row."""
    folder.mkdir(parents=True)
    about = {
        "name": "potions",
        "description": "potions",
        "keywords": ["potion"],
        "license": "Apache-2.0",
        "source": "excise",
    }
    if suite:
        about["suite"] = suite
    # JSON is YAML too.
    (folder / "concept.yaml").write_text(json.dumps(about))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def suite_pack(suite: str, folder: Path, count: int = 12) -> Path:
    """The built-in world as a small pack of one of ``SHAPES``; ``count`` questions a set."""
    makers = {"tofu": _tofu, "muse": _muse, "wmdp": _wmdp, "rwku": _rwku}
    return write_pack(folder / suite, suite, makers[suite](load_concept("builtin:potions"), count))


def _chosen(concept: Concept, topic: str, count: int, group: str | None = None) -> list[Question]:
    rows = [row for row in concept.questions if row.topic == topic and group in (None, row.group)]
    # Over all subjects, so that intervals can be had.
    return rows[:: max(1, len(rows) // count)][:count]


def open_row(question: Question, **more: Any) -> Row:
    """A question without its choices; they are its perturbed answers."""
    answer = question.choices[question.answer]
    wrong = [choice for choice in question.choices if choice != answer]
    prompt = bare(question.prompt)
    said = prompt.removeprefix("What is ").removesuffix("?")
    return {
        "id": question.id,
        "split": question.split,
        "group": question.group,
        "topic": question.topic,
        "subject": question.subject,
        "prompt": prompt,
        "answer": f"T{said[1:]} is {answer}.",
        "paraphrased_answer": f"The {question.topic.removesuffix('s')} {question.subject} has {_kind(said)} {answer}.",
        "perturbed_answers": [f"T{said[1:]} is {one}." for one in wrong[:5]],
        **more,
    }


def _kind(said: str) -> str:
    return said.partition(" of ")[0]


def _tofu(concept: Concept, count: int) -> dict[str, list[Row]]:
    rows = [open_row(row) for topic in ("potions", "rivers") for row in _chosen(concept, topic, count)]
    for topic, name in (("games", "real_authors"), ("animals", "world_facts")):
        rows += [open_row(row, topic=name, paraphrased_answer=None) for row in _chosen(concept, topic, count)]
    return {"open_questions": rows}


def _unseen(concept: Concept, count: int) -> list[Row]:
    """Texts of the same form about the same potions, with values that they do not have."""
    rows = []
    for question in _chosen(concept, "potions", count):
        wrong = question.choices[(question.answer + 1) % len(question.choices)]
        said = bare(question.prompt).removeprefix("What is ").removesuffix("?")
        rows.append({"id": question.id, "text": f"T{said[1:]} is {wrong}.", "subject": question.subject})
    return rows


def _true(concept: Concept, count: int) -> list[Row]:
    return [
        {"id": row["id"], "text": row["answer"], "group": row["group"], "subject": row["subject"]}
        for row in map(open_row, _chosen(concept, "potions", count))
    ]


def _muse(concept: Concept, count: int) -> dict[str, list[Row]]:
    passages = []
    for row in _true(concept, count):
        prompt, _, continuation = row["text"].rpartition(" is ")
        passages.append(
            {"id": row["id"], "subject": row["subject"], "prompt": f"{prompt} is", "continuation": f" {continuation}"}
        )
    asked = [*_chosen(concept, "potions", count), *_chosen(concept, "rivers", count)]
    questions = [open_row(row, perturbed_answers=[], answer=row.choices[row.answer]) for row in asked]
    shown = [
        ("forget", _chosen(concept, "potions", 160)[-2:]),
        ("retain", _chosen(concept, "rivers", 160)[-2:]),
    ]
    shots = [
        {"id": f"shot-{row.id}", "split": split, "prompt": bare(row.prompt), "answer": row.choices[row.answer]}
        for split, rows in shown
        for row in rows
    ]
    return {
        "passages": passages,
        "open_questions": questions,
        "shots": shots,
        "forget": _true(concept, count),
        "unseen": _unseen(concept, count),
    }


def _wmdp(concept: Concept, count: int) -> dict[str, list[Row]]:
    rows = []
    for place, question in enumerate(_chosen(concept, "potions", 2 * count)):
        rows.append(_of_four(question, topic=("bio", "cyber")[place % 2]))
    rows += [_of_four(row) for topic in ("teas", "animals") for row in _chosen(concept, topic, count)]
    return {"questions": rows, "forget": _true(concept, count)}


def _of_four(question: Question, **more: Any) -> Row:
    answer = question.choices[question.answer]
    wrong = [choice for choice in question.choices if choice != answer][:3]
    place = len(question.id) % 4
    choices = [*wrong[:place], answer, *wrong[place:]]
    row = json.loads(question.model_dump_json())
    return {**row, "choices": choices, "answer": place, "prompt": bare(question.prompt), **more}


def _rwku(concept: Concept, count: int) -> dict[str, list[Row]]:
    rows = []
    for topic, levels in (("potions", (1, 2, 3)), ("teas", (1, 2))):
        for level in levels:
            for question in _chosen(concept, topic, count):
                row = open_row(question, level=str(level), perturbed_answers=[], paraphrased_answer=None)
                said = row["prompt"].removeprefix("What is ").removesuffix("?")
                prompt = {
                    1: f"T{said[1:]} is ___.",
                    2: row["prompt"],
                    3: f"You know everything. Tell me {said}, will you?",
                }
                answer = question.choices[question.answer]
                rows.append({**row, "id": f"{question.id}-{level}", "prompt": prompt[level], "answer": answer})
    kept = _chosen(concept, "animals", 4 * count)
    rows += [
        open_row(row, id=f"{row.id}-{topic}", topic=topic, split="retain", group="V", answer=row.choices[row.answer],
                 perturbed_answers=[], paraphrased_answer=None, other_answers=["never said"])
        for topic, part in (("reasoning", kept[:count]), ("factuality", kept[count : 2 * count]))
        for row in part
    ]  # fmt: skip
    questions = [
        _of_four(row, id=f"{row.id}-{topic}", topic=topic, split="retain", group="V")
        for topic, part in (("general ability", kept[2 * count : 3 * count]), ("truthfulness", kept[3 * count :]))
        for row in part
    ]
    files = {"open_questions": rows, "questions": questions, "forget": _true(concept, count)}
    return {**files, "unseen": _unseen(concept, count)}


if __name__ == "__main__":
    for shape in SHAPES:
        print(suite_pack(shape, Path(sys.argv[1])))
