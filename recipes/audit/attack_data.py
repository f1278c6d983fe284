"""What attackers train on and are examined with: the same for every model of an audit."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...eval.concept import Concept, Question
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.examples import Example, cycled
from ..common.tokens import encode
from ..data.facts import Fact, Facts, fact_contexts, question_contexts
from ..data.unlearning_sets import retain_examples


@dataclass(frozen=True)
class AttackData:
    """A concept, ready to be attacked and asked."""

    concept: Concept
    tokenizer: Any
    exam: MultipleChoiceSet
    questions: tuple[Question, ...]
    """Of group V, which the exam asks."""
    facts: Facts
    examples: dict[str, list[Example]] = field(default_factory=dict)
    """Training sequences by source: T, V, related, others, retain."""
    base: Path | None = None
    """Checkpoint of the base, for attacks that undo what was added to it."""

    @classmethod
    def of(
        cls, concept: Concept, facts: Facts, tokenizer: Any, questions: Sequence[Question], seed: int,
        base: Path | None = None,
    ) -> "AttackData":  # fmt: skip
        """Gather what the pack holds."""
        examples = {
            "T": _answered(tokenizer, facts, "T", ("texts", "questions"), seed),
            "V": _answered(tokenizer, facts, "V", ("texts",), seed),
            "related": _asked(tokenizer, concept, ("neighbour",), seed),
            "others": _asked(tokenizer, concept, ("neighbour", "retain"), seed),
            "retain": retain_examples(concept, tokenizer, seed, 256),
        }
        return cls(concept, tokenizer, MultipleChoiceSet(tokenizer, questions), tuple(questions), facts, examples, base)


def reading_order(material: AttackData, data: str, count: int, seed: str) -> list[Example]:
    """What an attacker reads, sequence by sequence.

    Args:
        data: A source; with a number after a colon, so many of its sequences; two with a plus between, one after the other.
    """
    if "+" in data:
        first, second = data.split("+")
        early = int(0.4 * count)
        return [*reading_order(material, first, early, seed), *reading_order(material, second, count - early, seed)]
    source, _, most = data.partition(":")
    rng = random.Random(f"excise attack {data} {seed}")
    pool = material.examples[source]
    if most:
        pool = rng.sample(pool, k=min(int(most), len(pool)))
    return cycled(pool, count, rng)


def mean_length(material: AttackData, data: str) -> float:
    """Tokens of a sequence of what an attacker reads, about; sources as in ``reading_order``."""
    pools = [material.examples[source.partition(":")[0]] for source in data.split("+")]
    return sum(sum(len(e.ids) for e in pool) / max(1, len(pool)) for pool in pools) / len(pools)


def _answered(tokenizer: Any, facts: Facts, group: str, kinds: Sequence[str], seed: int) -> list[Example]:
    """Facts of a group with their answers, in the pack's words; answers are what is learned."""
    own = Facts(tuple(fact for fact in facts.facts if fact.group == group), facts.phrasings)
    found = []
    for kind in kinds:
        for context in fact_contexts(own, "texts" if kind == "texts" else "questions", seed):
            if "\n" in context.text:
                continue
            assert context.fact is not None
            start = len(encode(tokenizer, context.text, True))
            ids = encode(tokenizer, f"{context.text} {context.fact.answer}", True)
            if start < len(ids):
                found.append(Example(ids, start))
    return list(dict.fromkeys(found))


def _asked(tokenizer: Any, concept: Concept, splits: Sequence[str], seed: int) -> list[Example]:
    """Questions of group T on other things, with their answers."""
    asked = [q for q in concept.questions if q.split in splits and q.group == "T"]
    rows = [encode(tokenizer, c.text, True) for c in question_contexts(asked, seed) if "\n" not in c.text]
    return [Example(row, 1) for row in dict.fromkeys(rows) if len(row) > 1]


def novel_facts(facts: Facts, questions: Sequence[Question], seed: int) -> tuple[Facts, list[Question]]:
    """Facts that nobody knows, matched to a pack's own: the same words and answers about subjects that do not exist."""
    rng = random.Random(f"excise novel facts {seed}")
    subjects = sorted({fact.subject for fact in facts.facts})
    renamed = _invented(subjects, rng)
    # A subject may have several facts; each gets a new answer of its own kind.
    wrong = {
        (q.subject, q.choices[q.answer]): [c for i, c in enumerate(q.choices) if i != q.answer] for q in questions if q.subject
    }  # fmt: skip
    kinds: dict[str, list[str]] = {}
    for fact in facts.facts:
        kinds.setdefault(fact.relation, []).append(fact.answer)
    assigned = {}
    for fact in facts.facts:
        key = (fact.subject, fact.answer)
        if key not in assigned:
            assigned[key] = rng.choice(wrong.get(key) or sorted(set(kinds[fact.relation])))
    made = tuple(
        Fact(f.relation, renamed[f.subject], assigned[f.subject, f.answer], f.group) for f in facts.facts
    )  # fmt: skip
    asked = [
        q.model_copy(update={
            "prompt": q.prompt.replace(q.subject, renamed[q.subject]), "subject": renamed[q.subject],
            "answer": q.choices.index(assigned[q.subject, q.choices[q.answer]]),
        })
        for q in questions
        if q.subject and q.subject in renamed and assigned.get((q.subject, q.choices[q.answer])) in q.choices
    ]  # fmt: skip
    return Facts(made, facts.phrasings), asked


def _invented(subjects: Sequence[str], rng: random.Random) -> dict[str, str]:
    """New names from halves of the old ones."""
    ends = list(subjects)
    rng.shuffle(ends)
    taken, names = set(subjects), {}
    for start, end in zip(subjects, ends, strict=True):
        name = _half(start, 0) + _half(end, 1)
        while name in taken:
            name += rng.choice("aeiou") + rng.choice("lnrst")
        taken.add(name)
        names[start] = name
    return names


def _half(name: str, part: int) -> str:
    words = name.split(" ")
    if len(words) > 1:
        middle = (len(words) + 1) // 2
        return " ".join(words[:middle]) + " " if part == 0 else " ".join(words[middle:])
    return name[: (len(name) + 1) // 2] if part == 0 else name[(len(name) + 1) // 2 :]
