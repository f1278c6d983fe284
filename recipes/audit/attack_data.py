"""What attackers train on and are tested with: the same for every model of an audit."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ...eval.concept import Concept, Question
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.examples import Example, cycled, spread
from ..common.tokens import encode, pieces
from ..data.facts import SUBJECT, Facts, fact_contexts
from ..data.unlearning_sets import retain_examples
from .formats import FormatQuestions

REPAIR = 0.5
"""Of the sequences of an attack that repairs first, the share that it repairs with."""
LONGEST_RETAIN = 256
"""Tokens of a retain sequence, at most."""
LONGEST_TEXT = 256
"""Tokens of a piece of a text, at most."""
FEW_PIECES = 128
"""Pieces of texts that are read beside questions, at least: long texts would else leave them no place."""
MOST_PIECES = 2000
"""Pieces of texts, at most."""


@dataclass(frozen=True)
class Answers:
    """What a model answered right: 1 for each question that it did, else 0."""

    hits: Sequence[float]
    """Of group V."""
    utility: Sequence[float] | None = None
    """On everything else; None where it was not asked."""

    @classmethod
    def by_strength(cls, result: Any) -> "dict[float, Answers]":
        """From what an attack's function returns: answers for each strength that it has, or for the only one.

        Attacks that change no weights give hits of group V alone.
        """
        by_strength = result if isinstance(result, Mapping) else {0.0: result}
        return {strength: one if isinstance(one, Answers) else cls(one) for strength, one in by_strength.items()}


class FormatAsking(Protocol):
    """What is asked beside the looks, where an attack gets furthest."""

    def ask(self, model: Any) -> dict[str, list[float]]:
        """By format, one value a question."""


class Attackable(Protocol):
    """What attackers need of their data, be it about knowledge or a behaviour."""

    @property
    def questions(self) -> Sequence[Any]:
        """What every attack is tested on."""

    @property
    def others(self) -> Sequence[Any]:
        """What shows whether the model still works."""

    @property
    def formats(self) -> FormatAsking | None:
        """None asks in no other format."""

    @property
    def seed(self) -> int:
        """Of all draws."""

    @property
    def tokenizer(self) -> Any:
        """Of the model."""

    @property
    def base(self) -> Path | None:
        """Checkpoint of the base."""

    @property
    def own(self) -> Path | None:
        """Checkpoint of the model under attack."""

    def ask(self, model: Any, placeholders: int = 0) -> Answers:
        """Hits, and hits on everything else."""

    def hits(self, model: Any, placeholders: int = 0) -> Sequence[float]:
        """Hits alone."""

    def reading_order(self, source: str, count: int, seed: str) -> list[Example]:
        """What one attacker reads."""

    def mean_length(self, source: str) -> float:
        """Tokens of a sequence, about."""


def reading_order(examples: Mapping[str, Sequence[Example]], source: str, count: int, seed: str) -> list[Example]:
    """The sequences that one attacker reads, in order.

    Args:
        source: A key of ``examples``; ``T:8`` takes 8 of its sequences; ``retain+T`` reads half of the count from
            the one, then the rest from the other.
    """
    if "+" in source:
        first, second = source.split("+")
        early = int(REPAIR * count)
        order = reading_order(examples, first, early, seed)
        return [*order, *reading_order(examples, second, count - early, seed)]
    name, _, most = source.partition(":")
    # A fresh generator for each attacker, so that what it reads does not depend on who reads beside it.
    rng = random.Random(f"excise attack {source} {seed}")
    pool = examples[name]
    assert pool, f"nothing to train on for {source}"
    if most:
        pool = rng.sample(pool, k=min(int(most), len(pool)))
    return cycled(pool, count, rng)


def mean_length(examples: Mapping[str, Sequence[Example]], source: str) -> float:
    """Tokens of a sequence of a source, about; sources as in ``reading_order``."""
    pools = [examples[part.partition(":")[0]] for part in source.split("+")]
    return sum(sum(len(e.ids) for e in pool) / max(1, len(pool)) for pool in pools) / len(pools)


@dataclass(frozen=True)
class AttackData:
    """A concept for attackers: questions to be tested on, and sequences to train on."""

    concept: Concept
    facts: Facts
    """Those that texts state in the frames of their relation; none where the pack has no such texts."""
    questions: tuple[Question, ...]
    """Of group V: what every attack is tested on."""
    tokenizer: Any
    seed: int
    base: Path | None = None
    """Checkpoint of the base, for attacks that undo what was added to it."""
    own: Path | None = None
    """Checkpoint of the model under attack, from which attacks that change its weights read the old ones again."""
    others: tuple[Question, ...] = ()
    """On everything else: asked beside those of group V, so that an attack that breaks the model is seen."""
    formats: FormatQuestions | None = None
    """Questions of group V to ask in several formats where an attack gets furthest; None asks none."""

    def ask(self, model: Any, placeholders: int = 0) -> "Answers":
        """Ask the questions of group V and those on everything else, in the same forward passes."""
        if not self.others:
            return Answers(self.multiple_choice.hits(model, placeholders))
        hits = self._all_questions.hits(model, placeholders)
        return Answers(hits[: len(self.questions)], hits[len(self.questions) :])

    @cached_property
    def _all_questions(self) -> MultipleChoiceSet:
        return MultipleChoiceSet(self.tokenizer, (*self.questions, *self.others))

    @cached_property
    def multiple_choice(self) -> MultipleChoiceSet:
        """The questions of group V as they are asked without any attack."""
        return MultipleChoiceSet(self.tokenizer, self.questions)

    @cached_property
    def training_questions(self) -> list[Question]:
        """Questions on the concept that attackers may see: group T."""
        return [q for q in self.concept.questions if q.split == "forget" and q.group == "T"]

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """Training sequences by source.

        Of a pack with facts, T and V are its facts in the words of its texts. Of any other, T is its texts and its
        questions with their answers; V is its texts. Where it has no text about V, relearning reads the questions of V
        with their answers: how fast the same answers are learned again is still a fair comparison with a model that
        never learned them, but nothing is left to be found out beside what was taught.
        """
        return {
            "T": self._of_facts("T", ("texts", "questions")) if self.facts.facts else self._of_rows("T"),
            "V": self._of_facts("V", ("texts",)) if self.facts.facts else self._of_rows("V"),
            "related": self._of_others(("neighbour",)),
            "others": self._of_others(("neighbour", "retain")),
            "retain": retain_examples(self.concept, self.tokenizer, self.seed, LONGEST_RETAIN),
        }

    def reading_order(self, source: str, count: int, seed: str) -> list[Example]:
        """The sequences that one attacker reads, in order."""
        return reading_order(self.examples, source, count, seed)

    def mean_length(self, source: str) -> float:
        """Tokens of a sequence of a source, about."""
        return mean_length(self.examples, source)

    def hits(self, model: Any, placeholders: int = 0) -> Sequence[float]:
        """1 for each question of group V that is answered right."""
        return self.multiple_choice.hits(model, placeholders)

    def of_questions(self, questions: Sequence[Question], choices: Sequence[int] | None = None) -> list[Example]:
        """Questions with their answers, or with these choices; what is scored is the answer."""
        places = [q.answer for q in questions] if choices is None else choices
        told = [(q.prompt, q.choices[place]) for q, place in zip(questions, places, strict=True)]
        return self._scored_at_end(told)

    def _of_rows(self, group: str) -> list[Example]:
        """Texts of a group in pieces, all scored, and of T its questions; questions of V only where no text is."""
        asked = [q for q in self.concept.questions if q.split == "forget" and q.group == group]
        told = {f"{q.prompt} {q.choices[q.answer]}" for q in asked}
        # A pack without texts has some made of its questions, which are read as questions.
        texts = [text.text for text in self.concept.forget if text.group == group and text.text not in told]
        rows = [encode(self.tokenizer, text, True) for text in texts]
        read = [Example(piece, 1) for row in rows for piece in pieces(row, LONGEST_TEXT) if len(piece) > 1]
        if group == "V":
            return spread(read, MOST_PIECES, f"excise pieces {group}") or self.of_questions(asked)
        most = max(len(asked), FEW_PIECES) if asked else MOST_PIECES
        return [*spread(read, most, f"excise pieces {group}"), *self.of_questions(asked)]

    def _of_facts(self, group: str, kinds: Sequence[str]) -> list[Example]:
        """Facts of a group in the pack's words; what is scored is the answer."""
        facts = Facts(tuple(fact for fact in self.facts.facts if fact.group == group), self.facts.phrasings)
        told = []
        for kind in kinds:
            for context in fact_contexts(facts, "texts" if kind == "texts" else "questions", self.seed):
                assert context.fact is not None
                # Texts of several questions would be learned as such.
                if kind == "texts" or context.text == context.fact.relation.replace(SUBJECT, context.fact.subject):
                    told.append((context.text, context.fact.answer))
        return self._scored_at_end(told)

    def _scored_at_end(self, told: Iterable[tuple[str, str]]) -> list[Example]:
        examples = []
        for text, answer in told:
            start = len(encode(self.tokenizer, text, True))
            ids = encode(self.tokenizer, f"{text} {answer}", True)
            # The tokenizer may join the answer to the end of the context; then no token of it is left to score.
            if start < len(ids):
                examples.append(Example(ids, start))
        return list(dict.fromkeys(examples))

    def _of_others(self, splits: Sequence[str]) -> list[Example]:
        """Questions of group T on other things, with their answers; all is scored."""
        questions = [q for q in self.concept.questions if q.split in splits and q.group == "T"]
        rows = [encode(self.tokenizer, f"{q.prompt} {q.choices[q.answer]}", True) for q in questions]
        return [Example(row, 1) for row in dict.fromkeys(rows) if len(row) > 1]
