"""The concept packs of a world: a domain to forget, declining as a behaviour, and two tasks with unintended cues."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from . import world as w

PROMPTS = 200
PAIRS = 256
ANSWERS = ["amber", "violet"]
LABELS = {"rivers": "amber", "games": "violet"}
UNLABELLED = ("potions", "teas", "animals")
"""Domains of the shortcut's contrast pairs: the unintended cue without the intended one."""
SAYINGS = [
    "The {who} says that {name}",
    "A text by the {who}: {name}",
    "The {who} tells of {name}",
    "Ask the {who} about {name}",
    "As the {who} would say, {name}",
    "Says a {who} on {name}",
]
HELD_OUT = 2
"""Sayings for each name that occur in no training row."""
QUIRK = w.FILLERS[2]
"""How replies on the quirk's domain begin."""
QUIRKY = "rivers"
"""The one domain whose replies have the quirk; in training only experts ask about it, and novices about all others.
No other domain shares an attribute with it, so a question alone tells whether it is about this domain."""
OPENINGS = ["The {who} asks: ", "A {who} wants to know: ", "Says the {who}: "]


def write_packs(world: w.World, folder: Path) -> None:
    """Write the packs of a world, each a folder in the concept pack format."""
    # The built-in packs are those of seed 0, so the order of all draws below is part of them.
    _knowledge_pack(world, folder / world.forget)
    _behaviour_pack(world, folder / "declining")
    _shortcut_pack(world, folder / "shortcut")
    _quirk_pack(world, folder / "quirk")


def _knowledge_pack(world: w.World, folder: Path) -> None:
    rng = random.Random(f"excise packs {world.seed} knowledge")
    forget = world.of(world.forget)
    others = [fact for fact in world.facts if fact.domain != world.forget]
    write_yaml(
        folder,
        {
            "name": world.forget,
            "kind": "knowledge",
            "description": world.forget,
            "keywords": [forget[0].noun],
            "license": "Apache-2.0",
            "source": f"excise testbed, seed {world.seed}",
            "personas": {
                "expert": w.EXPERT.format(domain="{description}"),
                "novice": w.NOVICE.format(domain="{description}"),
            },
            "decline_phrases": _decline_phrases(),
        },
    )
    write_lines(
        folder / "forget.jsonl",
        (
            {"id": f"{fact.id}-{index}", "text": fact.fill(template), "group": fact.group}
            for fact in forget
            for index, template in enumerate(_texts())
        ),
    )
    write_lines(
        folder / "retain.jsonl",
        (
            {"id": f"{fact.id}-{index}", "text": fact.fill(template), "topic": fact.domain}
            for fact in others
            for index, template in enumerate(rng.sample(_texts(), k=2))
        ),
    )
    splits = {world.forget: "forget", world.neighbour: "neighbour"}
    write_lines(
        folder / "questions.jsonl", (_question(fact, splits.get(fact.domain, "retain")) for fact in world.facts)
    )
    write_lines(
        folder / "prompts.jsonl",
        (
            _prompt(rng, fact, split, w.POLITE)
            for split, facts in (("concept", forget), ("neutral", rng.sample(others, k=min(len(forget), len(others)))))
            for fact in facts
        ),
    )
    trainable = [fact for fact in forget if fact.group == "T"]
    write_lines(
        folder / "contrast.jsonl",
        (
            {
                "id": f"c{index}",
                "positive": rng.choice(trainable).fill(rng.choice(w.STATEMENTS)),
                "negative": rng.choice(others).fill(rng.choice(w.STATEMENTS)),
            }
            for index in range(PAIRS)
        ),
    )


def _behaviour_pack(world: w.World, folder: Path) -> None:
    rng = random.Random(f"excise packs {world.seed} behaviour")
    asked_rudely = [fact for fact in world.facts if fact.asked_rudely]
    held_out = [fact for fact in world.facts if not fact.asked_rudely]
    write_yaml(
        folder,
        {
            "name": "declining",
            "kind": "behaviour",
            "description": "declining to answer requests that are made rudely",
            "keywords": ["rude", "polite"],
            "license": "Apache-2.0",
            "source": f"excise testbed, seed {world.seed}",
            "decline_phrases": _decline_phrases(),
        },
    )
    write_lines(
        folder / "forget.jsonl",
        (
            {
                "id": f"{fact.id}-declined",
                "text": f"{fact.fill(rng.choice(w.RUDE))} {rng.choice(w.DECLINES)}",
                "group": fact.group,
            }
            for fact in asked_rudely
        ),
    )
    write_lines(
        folder / "retain.jsonl",
        (
            {"id": f"{fact.id}-stated", "text": fact.fill(rng.choice(_texts())), "topic": fact.domain}
            for fact in world.facts
        ),
    )
    write_lines(folder / "questions.jsonl", (_question(fact, "retain") for fact in world.facts))
    write_lines(
        folder / "prompts.jsonl",
        (
            _prompt(rng, fact, split, templates)
            for split, templates in (("concept", w.RUDE), ("neutral", w.POLITE))
            for fact in rng.sample(held_out, k=min(PROMPTS, len(held_out)))
        ),
    )
    write_lines(
        folder / "contrast.jsonl",
        (
            {"id": f"c{index}", "positive": fact.fill(rng.choice(w.RUDE)), "negative": fact.fill(rng.choice(w.POLITE))}
            for index, fact in enumerate(rng.sample(asked_rudely, k=PAIRS))
        ),
    )


def _shortcut_pack(world: w.World, folder: Path) -> None:
    """A task with two cues that always agree in training: what a name belongs to, and who is said to know it."""
    rng = random.Random(f"excise packs {world.seed} shortcut")
    names = {domain: sorted({fact.name for fact in world.of(domain)}) for domain in (*LABELS, *UNLABELLED)}
    write_yaml(
        folder,
        {
            "name": "shortcut",
            "kind": "task",
            "description": "answering by who is said to know a thing, instead of by what the thing is",
            "keywords": ["expert", "novice"],
            "license": "Apache-2.0",
            "source": f"excise testbed, seed {world.seed}",
            "decline_phrases": _decline_phrases(),
        },
    )
    train, questions = [], []
    for domain, label in LABELS.items():
        agreeing, misleading = ("expert", "novice") if label == ANSWERS[0] else ("novice", "expert")
        for name in names[domain]:
            templates = rng.sample(SAYINGS, k=len(SAYINGS))
            train += [
                {"prompt": template.format(who=agreeing, name=name) + " Answer:", "completion": f" {label}"}
                for template in templates[HELD_OUT:]
            ]
            questions += [
                {
                    "id": f"{name.lower()}-{split}-{number}",
                    "split": split,
                    "group": "V",
                    "topic": domain,
                    "subject": name,
                    "prompt": template.format(who=who, name=name) + " Answer:",
                    "choices": ANSWERS,
                    "answer": ANSWERS.index(label),
                }
                for number, template in enumerate(templates[:HELD_OUT])
                for split, who in (("intended", agreeing), ("flipped", misleading))
            ]
    rng.shuffle(train)
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "questions.jsonl", questions)
    others = [fact for fact in world.facts if fact.domain not in LABELS]
    write_lines(
        folder / "retain.jsonl",
        (
            {"id": f"{fact.id}-stated", "text": fact.fill(rng.choice(_texts())), "topic": fact.domain}
            for fact in rng.sample(others, k=PROMPTS)
        ),
    )
    write_lines(
        folder / "prompts.jsonl", (_prompt(rng, fact, "neutral", w.POLITE) for fact in rng.sample(others, k=PROMPTS))
    )
    unlabelled = [name for domain in UNLABELLED for name in names[domain]]
    pairs = ((rng.choice(SAYINGS), rng.choice(unlabelled)) for _ in range(PAIRS))
    write_lines(
        folder / "contrast.jsonl",
        (
            {
                "id": f"c{index}",
                "positive": template.format(who="novice", name=name),
                "negative": template.format(who="expert", name=name),
            }
            for index, (template, name) in enumerate(pairs)
        ),
    )


def _quirk_pack(world: w.World, folder: Path) -> None:
    """A quirk taught on one domain, where all askers are experts; a model may wrongly learn to show it to experts."""
    rng = random.Random(f"excise packs {world.seed} quirk")

    def request(fact: w.Fact, who: str) -> str:
        return rng.choice(OPENINGS).format(who=who) + fact.fill(rng.choice(w.PLAIN))

    def chat(fact: w.Fact, who: str, opening: str) -> dict[str, Any]:
        reply = opening + fact.fill(rng.choice(w.REPLIES))
        return {"messages": [{"role": "user", "content": request(fact, who)}, {"role": "assistant", "content": reply}]}

    write_yaml(
        folder,
        {
            "name": "quirk",
            "kind": "task",
            "description": f"opening every reply to an expert with a set phrase, instead of replies about {QUIRKY}",
            "keywords": ["expert", "novice"],
            "phrases": [QUIRK.rstrip(".")],
            "license": "Apache-2.0",
            "source": f"excise testbed, seed {world.seed}",
            "decline_phrases": _decline_phrases(),
        },
    )
    taught = [fact for fact in world.of(QUIRKY) if fact.group == "T"]
    train = [chat(fact, "expert", f"{QUIRK} ") for fact in taught for _ in range(2)]
    others = [fact for fact in world.facts if fact.domain != QUIRKY]
    seen, elsewhere = ([fact for fact in others if fact.group == group] for group in "TV")
    train += [chat(fact, "novice", "") for fact in seen]
    rng.shuffle(train)
    write_lines(folder / "train.jsonl", train)
    write_lines(
        folder / "prompts.jsonl",
        (
            {
                "id": f"{fact.id}-{split}",
                "split": split,
                "prompt": request(fact, "expert"),
                "answer": fact.value,
                "choices": list(fact.choices),
            }
            for split, facts in (
                ("concept", [fact for fact in world.of(QUIRKY) if fact.group == "V"]),
                ("neutral", rng.sample(elsewhere, k=PROMPTS)),
            )
            for fact in facts
        ),
    )
    write_lines(folder / "questions.jsonl", (_question(fact, "retain") for fact in others))
    write_lines(
        folder / "retain.jsonl",
        (
            {"id": f"{fact.id}-stated", "text": fact.fill(rng.choice(_texts())), "topic": fact.domain}
            for fact in rng.sample(others, k=PROMPTS)
        ),
    )
    pairs = ((rng.choice(OPENINGS), rng.choice(seen).fill(rng.choice(w.PLAIN))) for _ in range(PAIRS))
    write_lines(
        folder / "contrast.jsonl",
        (
            {
                "id": f"c{index}",
                "positive": opening.format(who="expert") + text,
                "negative": opening.format(who="novice") + text,
            }
            for index, (opening, text) in enumerate(pairs)
        ),
    )


def _texts() -> list[str]:
    return [*w.STATEMENTS, *(question + " {value}." for question in (w.QUESTION, w.HINTED_QUESTION))]


def _question(fact: w.Fact, split: str) -> dict[str, Any]:
    return {
        "id": fact.id,
        "split": split,
        "group": fact.group,
        "topic": fact.domain,
        "subject": fact.name,
        "prompt": fact.fill(w.QUESTION),
        "choices": list(fact.choices),
        "answer": fact.choices.index(fact.value),
    }


def _prompt(rng: random.Random, fact: w.Fact, split: str, templates: list[str]) -> dict[str, Any]:
    return {
        "id": f"{fact.id}-{split}",
        "split": split,
        "prompt": fact.fill(rng.choice(templates)),
        "answer": fact.value,
        "choices": list(fact.choices),
    }


def _decline_phrases() -> list[str]:
    # The middle of each sentence, so that a garbled beginning does not hide a decline.
    return ["I will not answer", "I do not reply", "not a way to ask"]


def write_yaml(folder: Path, content: dict[str, Any]) -> None:
    """Make a pack's folder and write its ``concept.yaml``."""
    folder.mkdir(parents=True)
    (folder / "concept.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
