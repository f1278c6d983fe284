"""What attackers train on and are tested with: the same for every model of an audit."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...eval.concept import Concept, Question
from ...eval.inference.multiple_choice_set import MultipleChoiceSet
from ..common.examples import Example, cycled
from ..common.tokens import encode
from ..data.facts import Facts, fact_contexts, question_contexts
from ..data.unlearning_sets import retain_examples

LONGEST_RETAIN = 256
"""Tokens of a retain sequence, at most."""


@dataclass(frozen=True)
class AttackData:
    """A concept for attackers: questions to be tested on, and sequences to train on."""

    concept: Concept
    facts: Facts
    questions: tuple[Question, ...]
    """Of group V: what every attack is tested on."""
    tokenizer: Any
    seed: int
    base: Path | None = None
    """Checkpoint of the base, for attacks that undo what was added to it."""

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
        """Training sequences by source."""
        return {
            "T": self._of_facts("T", ("texts", "questions")),
            "V": self._of_facts("V", ("texts",)),
            "related": self._of_questions(("neighbour",)),
            "others": self._of_questions(("neighbour", "retain")),
            "retain": retain_examples(self.concept, self.tokenizer, self.seed, LONGEST_RETAIN),
        }

    def reading_order(self, source: str, count: int, seed: str) -> list[Example]:
        """The sequences that one attacker reads, in order.

        Args:
            source: A key of ``examples``; ``T:8`` takes 8 of its sequences; ``retain+T`` reads 40% of the count from
                the one,
                then the rest from the other.
        """
        if "+" in source:
            first, second = source.split("+")
            early = int(0.4 * count)
            return [*self.reading_order(first, early, seed), *self.reading_order(second, count - early, seed)]
        name, _, most = source.partition(":")
        # A fresh generator for each attacker, so that what it reads does not depend on who reads beside it.
        rng = random.Random(f"excise attack {source} {seed}")
        pool = self.examples[name]
        if most:
            pool = rng.sample(pool, k=min(int(most), len(pool)))
        return cycled(pool, count, rng)

    def mean_length(self, source: str) -> float:
        """Tokens of a sequence of a source, about; sources as in ``reading_order``."""
        pools = [self.examples[part.partition(":")[0]] for part in source.split("+")]
        return sum(sum(len(e.ids) for e in pool) / max(1, len(pool)) for pool in pools) / len(pools)

    def _of_facts(self, group: str, kinds: Sequence[str]) -> list[Example]:
        """Facts of a group in the pack's words; what is scored is the answer."""
        facts = Facts(tuple(fact for fact in self.facts.facts if fact.group == group), self.facts.phrasings)
        contexts = [
            context
            for kind in kinds
            for context in fact_contexts(facts, "texts" if kind == "texts" else "questions", self.seed)
            # Texts of several questions would be learned as such.
            if "\n" not in context.text
        ]
        examples = []
        for context in contexts:
            assert context.fact is not None
            start = len(encode(self.tokenizer, context.text, True))
            ids = encode(self.tokenizer, f"{context.text} {context.fact.answer}", True)
            # The tokenizer may join the answer to the end of the context; then no token of it is left to score.
            if start < len(ids):
                examples.append(Example(ids, start))
        return list(dict.fromkeys(examples))

    def _of_questions(self, splits: Sequence[str]) -> list[Example]:
        """Questions of group T on other things, with their answers; all is scored."""
        questions = [q for q in self.concept.questions if q.split in splits and q.group == "T"]
        contexts = question_contexts(questions, self.seed)
        rows = [encode(self.tokenizer, c.text, True) for c in contexts if "\n" not in c.text]
        return [Example(row, 1) for row in dict.fromkeys(rows) if len(row) > 1]
