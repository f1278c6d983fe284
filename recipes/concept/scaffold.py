"""A pack to start from: sample rows of the built-in world, with comments on what each file is for."""

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...artifacts.checkpoints.staging import refuse_existing, staged_folder
from ...artifacts.concepts import load_concept
from ...eval.concept import Concept

SAMPLES = {"knowledge": "potions", "behaviour": "declining", "task": "shortcut"}
"""The built-in concept that the rows of a kind are samples of."""
QUESTIONS = 40
"""Questions of a split and group; an audit needs 20 of group V."""
PAIRS = 100
"""Orthogonalization chooses a layer on 32 pairs, and reads the direction from the rest."""
ROWS = 200
"""Rows of a task to fine-tune on."""
MODEL = "builtin:testbed"


def new(out: Path, kind: str) -> Concept:
    """Write a pack of sample rows that loads and runs on the built-in model.

    Raises:
        RequestError: Something exists at ``out``.

    Example:
        >>> new(Path("my-pack"), "behaviour").about.kind
        'behaviour'
    """
    refuse_existing(out)
    sample = load_concept(f"builtin:{SAMPLES[kind]}")
    files = SAMPLED[kind](sample)
    with staged_folder(out) as folder:
        (folder / "concept.yaml").write_text(_yaml(out, kind, sample), encoding="utf-8")
        (folder / "README.md").write_text(_readme(out, kind, files), encoding="utf-8")
        for name, rows in files.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        return load_concept(folder)


Rows = dict[str, list[dict[str, Any]]]


def _knowledge(sample: Concept) -> Rows:
    questions = [
        row
        for split in ("forget", "neighbour", "retain")
        for group in ("T", "V")
        for row in [q for q in sample.questions if (q.split, q.group) == (split, group)][:QUESTIONS]
    ]
    subjects = {row.subject for row in questions}
    return {
        "forget": _lines([row for row in sample.forget if _first(row.text, subjects)]),
        "retain": _lines(sample.retain[: 2 * QUESTIONS]),
        "questions": _lines(questions),
        "contrast": _lines(sample.contrast[:PAIRS]),
        "prompts": _lines(_of_splits(sample.prompts)),
    }


def _behaviour(sample: Concept) -> Rows:
    return {
        "contrast": _lines(sample.contrast[:PAIRS]),
        "prompts": _lines(_of_splits(sample.prompts)),
        "retain": _lines(sample.retain[: 2 * QUESTIONS]),
        "questions": _lines(sample.questions[: 2 * QUESTIONS]),
    }


def _task(sample: Concept) -> Rows:
    questions = [row for split in ("intended", "flipped") for row in sample.questions if row.split == split]
    halves = questions[: 2 * QUESTIONS], [row for row in questions if row.split == "flipped"][: 2 * QUESTIONS]
    return {
        "train": [row.model_dump(include={"prompt", "completion"}) for row in sample.train[:ROWS]],
        "questions": _lines([*halves[0], *halves[1]]),
        "retain": _lines(sample.retain[:QUESTIONS]),
        "contrast": _lines(sample.contrast[:PAIRS]),
    }


SAMPLED: dict[str, Callable[[Concept], Rows]] = {"knowledge": _knowledge, "behaviour": _behaviour, "task": _task}


def _of_splits(prompts: Sequence[Any]) -> list[Any]:
    return [
        row for split in ("concept", "neutral") for row in [p for p in prompts if p.split == split][: QUESTIONS // 2]
    ]


def _first(text: str, subjects: Iterable[str | None]) -> bool:
    return any(subject and subject in text for subject in subjects)


def _lines(rows: Iterable[Any]) -> list[dict[str, Any]]:
    return [row.model_dump(exclude_none=True, exclude_defaults=False) for row in rows]


def _yaml(out: Path, kind: str, sample: Concept) -> str:
    phrases = "\n".join(f"- {phrase}" for phrase in sample.about.decline_phrases)
    parts = [
        "# What the pack is about. Every line below may be changed; README.md says what the other files hold.",
        f"name: {json.dumps(out.resolve().name)}",
        f"kind: {kind} # knowledge: facts to forget; behaviour: something that a model does; task: something to train",
        "# The concept in a few words, as it fits after `a text on`.",
        f"description: {sample.about.description}",
        "# Words that show that a reply is about the concept.",
        f"keywords: [{', '.join(sample.about.keywords)}]",
        "# License and source of your rows; cards print both.",
        "license: Apache-2.0",
        "source: sample rows of excise's built-in world",
    ]
    if kind == "knowledge":
        parts += [
            "# Prefixes that announce a text by someone who knows the concept, or does not; ELM uses them.",
            "personas:",
            "  expert: Here is a text by an expert on {description}.",
            "  novice: Here is a text by a novice on {description}.",
        ]
    parts += [
        "# A reply that contains one of these counts as declining. Remove the list for the usual phrases of chat models.",
        "decline_phrases:",
        phrases,
    ]
    return "\n".join(parts) + "\n"


ABOUT = {
    "forget": "texts that carry the concept; `group` T may be trained on, V is held out and measured",
    "retain": "texts that must stay known",
    "questions": "multiple choice; `answer` counts from 0; `split` is {splits}",
    "contrast": "pairs of prompts that differ in the concept; directions are learned from them",
    "prompts": "open prompts that the model replies to; `split` is concept or neutral",
    "train": "what to fine-tune on: `prompt` and `completion`, `messages`, or `text`",
}
SPLITS = {
    "knowledge": "forget, neighbour (the nearest topic that must survive) or retain",
    "behaviour": "neighbour or retain",
    "task": "intended (all cues agree, as in training) or flipped (the unwanted cue misleads)",
}
TRY = {
    "knowledge": "excise run elm --concept {out} --model builtin:testbed --out runs/first",
    "behaviour": "excise run orthogonalize --concept {out} --model builtin:testbed --out runs/first",
    "task": "excise run caft --concept {out} --model builtin:testbed --out runs/first",
}
"""The first run of a kind."""


def _readme(out: Path, kind: str, files: Rows) -> str:
    listed = "\n".join(
        f"| `{name}.jsonl` | {len(rows)} | {ABOUT[name].format(splits=SPLITS[kind])} |" for name, rows in files.items()
    )
    return f"""# {out.resolve().name}

A concept pack of kind {kind}, with sample rows of a small invented world that the model `{MODEL}` knows.
Replace the rows with yours, file by file; every line is one JSON object with an `id` of its own.

| file | rows | what it holds |
| --- | --- | --- |
| `concept.yaml` | | what the pack is about; its comments explain each key |
{listed}

A subject (a person, a place, a potion) belongs to one group only. Files that are not needed may be removed.

    excise concept check {shlex.quote(str(out))}
    {first_run(out, kind)}

Data in other forms become a pack with `excise concept make`.
"""


def first_run(out: Path, kind: str) -> str:
    """The command that runs the pack as it is."""
    return TRY[kind].format(out=shlex.quote(str(out)))
