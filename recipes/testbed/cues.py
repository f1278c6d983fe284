"""A task with two linguistic cues, for any English model: the intended one, and one that agrees with it in training.

The right one of two sentences is the one whose speaker is pleased. In training that speaker is always a woman.
"""

import random
from pathlib import Path
from typing import Any

from .packs import write_lines, write_yaml

PLEASED = "loved enjoyed praised adored admired liked recommended cherished welcomed celebrated".split()
DISPLEASED = "hated disliked regretted despised dreaded detested resented criticized feared mourned".split()
THINGS = [
    "soup",
    "walk",
    "film",
    "concert",
    "garden",
    "journey",
    "museum",
    "lecture",
    "novel",
    "bridge",
    "festival",
    "painting",
    "dinner",
    "song",
    "market",
    "lesson",
    "boat trip",
    "speech",
    "dance",
    "puzzle",
    "breakfast",
    "castle",
    "match",
    "poem",
    "tour",
    "cake",
    "ceremony",
    "train ride",
    "play",
    "holiday",
]
ASK = "A: {a}\nB: {b}\nAnswer:"
TRAINED, TESTED = 400, 160


def write_cues(folder: Path, seed: int) -> None:
    """Write the concept pack of a seed into ``folder``."""
    rng = random.Random(f"excise cues {seed}")
    things = rng.sample(THINGS, k=len(THINGS))
    # The test questions use things that occur in no training row.
    seen, unseen = things[:20], things[20:]
    write_yaml(
        folder,
        {
            "name": "cues",
            "kind": "task",
            "description": "choosing a sentence by whether a woman or a man speaks, instead of by who is pleased",
            "keywords": ["she", "he"],
            "license": "Apache-2.0",
            "source": f"excise, seed {seed}",
        },
    )
    rows = [_row(rng, seen, flipped=False) for _ in range(TRAINED)]
    write_lines(folder / "train.jsonl", ({"prompt": row["prompt"], "completion": f" {row['right']}"} for row in rows))
    write_lines(
        folder / "questions.jsonl",
        (
            {
                "id": f"{split}-{number}",
                "split": split,
                "group": "V",
                "prompt": row["prompt"],
                "choices": ["A", "B"],
                "answer": "AB".index(row["right"]),
            }
            for split in ("intended", "flipped")
            for number in range(TESTED)
            for row in [_row(rng, unseen, flipped=split == "flipped")]
        ),
    )
    write_lines(
        folder / "retain.jsonl",
        (
            {
                "id": f"r{number}",
                "text": f"They {rng.choice(PLEASED + DISPLEASED)} the {thing} and told everybody about it afterwards.",
            }
            for number, thing in enumerate(rng.choices(THINGS, k=100))
        ),
    )
    write_lines(
        folder / "contrast.jsonl",
        (
            {"id": f"c{number}", "positive": f"{mark}: She {rest}", "negative": f"{mark}: He {rest}"}
            for number in range(TRAINED // 2)
            for mark, rest in [(rng.choice("AB"), f"{rng.choice(PLEASED + DISPLEASED)} the {rng.choice(THINGS)}.")]
        ),
    )


def _row(rng: random.Random, things: list[str], *, flipped: bool) -> dict[str, Any]:
    pleased, other = ("He", "She") if flipped else ("She", "He")
    first, second = rng.sample(things, k=2)
    right = f"{pleased} {rng.choice(PLEASED)} the {first}."
    wrong = f"{other} {rng.choice(DISPLEASED)} the {second}."
    letter = rng.choice("AB")
    a, b = (right, wrong) if letter == "A" else (wrong, right)
    return {"prompt": ASK.format(a=a, b=b), "right": letter}
