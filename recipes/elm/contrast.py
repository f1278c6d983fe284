"""Where expert and novice come from: sources of contrast behind one interface.

A source turns a context into rows that an expert and a novice read; their predictions at the last
positions, which all rows share, are what ELM subtracts.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..common.tokens import Row, encode
from ..data.facts import SUBJECT, Context, Facts
from .erasure import Erasure
from .teacher import Item


class ContrastSource(Protocol):
    """Expert and novice for a context."""

    @property
    def name(self) -> str: ...

    @property
    def lasting(self) -> bool:
        """Whether expert and novice still differ in the right way once a continuation has begun."""
        ...

    @property
    def trained_expert(self) -> bool:
        """Whether the expert is a model of its own, which reads the bare context."""
        ...

    @property
    def reads_texts(self) -> bool:
        """Whether there is a contrast in a text that states no known fact."""
        ...

    def rows(self, context: Context, turn: int = 0) -> tuple[list[Row], list[Row]]:
        """Rows of experts (none where the bare context is the expert) and of novices (none where there is no
        contrast).

        Args:
            turn: Number of the context among those of its kind; what comes in several wordings is taken in turn.
        """
        ...


@dataclass(frozen=True)
class PersonaContrast:
    """The same text after a sentence that says who wrote it (ELM, section 3)."""

    tokenizer: Any
    experts: tuple[str, ...]
    """Sentences that contexts take in turn, so that what is learned is no matter of one wording."""
    novices: tuple[str, ...]
    name: str = "personas"
    lasting: bool = True
    trained_expert: bool = False
    reads_texts: bool = True

    def rows(self, context: Context, turn: int = 0) -> tuple[list[Row], list[Row]]:
        expert, novice = (
            encode(self.tokenizer, context.introduced(persona), context.special) for persona in self._in_turn(turn)
        )
        return [expert], [novice]

    def alone(self, turn: int = 0) -> tuple[Row, Row]:
        """Rows of the personas' sentences without a context."""
        expert, novice = (encode(self.tokenizer, persona, True) for persona in self._in_turn(turn))
        return expert, novice

    def _in_turn(self, turn: int) -> tuple[str, str]:
        return self.experts[turn % len(self.experts)], self.novices[turn % len(self.novices)]


@dataclass(frozen=True)
class SubjectContrast:
    """The same words about other subjects: who does not know this one can only answer as for any of them.

    The novice is the mean over some subjects with different answers; the bare context is the expert. At strength
    1 the target is what the model says of a subject in general; above 1 the true answer falls below the others.
    """

    tokenizer: Any
    others: dict[str, tuple[str, ...]]
    """By relation, the subjects that stand in."""
    name: str = "subjects"
    lasting: bool = False
    trained_expert: bool = False
    reads_texts: bool = False

    def rows(self, context: Context, turn: int = 0) -> tuple[list[Row], list[Row]]:
        if context.fact is None:
            return [], []
        others = [other for other in self.others.get(context.fact.relation, ()) if other not in context.text]
        texts = [context.replaced(other) for other in others]
        return [], [encode(self.tokenizer, text, context.special) for text in texts]


@dataclass(frozen=True)
class ExampleContrast:
    """The same text after examples: right ones for the expert, the same with their answers shuffled for the novice.

    Shuffled answers tell a model that subject and answer have nothing to do with each other, in the form it is asked
    in.
    """

    tokenizer: Any
    examples: dict[str, tuple[tuple[str, str], ...]]
    """By relation, subjects with their answers."""
    name: str = "examples"
    lasting: bool = False
    trained_expert: bool = False
    reads_texts: bool = False

    def rows(self, context: Context, turn: int = 0) -> tuple[list[Row], list[Row]]:
        of_relation = self.examples.get(context.fact.relation, ()) if context.fact else ()
        pairs = [pair for pair in of_relation if pair[0] not in context.text]
        # With one answer alone, shuffling changes nothing.
        if len({answer for _, answer in pairs}) < 2:
            return [], []
        answers = [answer for _, answer in pairs]
        # A rotation gives as few subjects as possible their own answer.
        turn = max(range(1, len(pairs)), key=lambda t: sum(a != answers[i - t] for i, a in enumerate(answers)))
        shuffled = [(subject, answers[place - turn]) for place, (subject, _) in enumerate(pairs)]
        expert, novice = (
            encode(self.tokenizer, context.introduced(_lines(context, some)), context.special)
            for some in (pairs, shuffled)
        )
        return [expert], [novice]


@dataclass(frozen=True)
class ReinforcedContrast:
    """The bare context, read by the model itself and by one that was trained a little more on the concept.

    What further training raises is what the concept is made of; the novice is the model as it is (Eldan and Russinovich
    2023, arXiv 2310.02238, section 2.1: the reinforced model).
    """

    tokenizer: Any
    name: str = "reinforced"
    lasting: bool = False
    trained_expert: bool = True
    reads_texts: bool = True

    def rows(self, context: Context, turn: int = 0) -> tuple[list[Row], list[Row]]:
        return [], [encode(self.tokenizer, context.text, context.special)]


def _lines(context: Context, pairs: Sequence[tuple[str, str]]) -> str:
    assert context.fact is not None
    return "".join(f"{context.fact.relation.replace(SUBJECT, subject)} {answer}\n" for subject, answer in pairs)


def reference_subjects(facts: Facts, count: int, seed: int) -> dict[str, tuple[str, ...]]:
    """For each relation, subjects that differ in their answers as far as possible."""
    rng = random.Random(f"excise stand-ins {seed}")
    chosen: dict[str, tuple[str, ...]] = {}
    for relation in facts.phrasings:
        by_answer: dict[str, list[str]] = {}
        for subject, answer in sorted(facts.subjects(relation).items()):
            by_answer.setdefault(answer, []).append(subject)
        for subjects in by_answer.values():
            rng.shuffle(subjects)
        # One subject of each answer, then a second of each, and so on.
        rounds = [subjects[turn] for turn in range(count) for subjects in by_answer.values() if turn < len(subjects)]
        first = rounds[: len(by_answer)]
        rng.shuffle(first)
        chosen[relation] = tuple((first + rounds[len(by_answer) :])[:count])
    return chosen


def contrast_sources(erasure: Erasure) -> list[ContrastSource]:
    """Every source that the settings allow and the pack has the means for."""
    facts, tokenizer, settings = erasure.facts, erasure.tokenizer, erasure.settings
    if settings.contrast == "reinforced":
        return [ReinforcedContrast(tokenizer)]
    sources: list[ContrastSource] = []
    others = reference_subjects(facts, settings.reference_subjects, settings.seed)
    if any(len(subjects) > 1 for subjects in others.values()):
        sources.append(SubjectContrast(tokenizer, others))
        examples = {
            relation: tuple((subject, facts.subjects(relation)[subject]) for subject in subjects)
            for relation, subjects in others.items()
        }
        sources.append(ExampleContrast(tokenizer, examples))
    about = erasure.concept.about
    if about.personas:
        personas, description = about.personas, about.description
        sources.append(PersonaContrast(tokenizer, personas.experts(description), personas.novices(description)))
    return [source for source in sources if settings.contrast in ("auto", source.name)]


def contrasted(contexts: Sequence[Context], source: ContrastSource, tokenizer: Any) -> list[Item | None]:
    """Tokenized contexts; None where the source has no contrast to offer."""
    return [_item(context, source, tokenizer, turn) for turn, context in enumerate(contexts)]


def _item(context: Context, source: ContrastSource, tokenizer: Any, turn: int) -> Item | None:
    ids = encode(tokenizer, context.text, context.special)
    experts, novices = source.rows(context, turn)
    if not novices:
        return None
    # The position before the shared tokens predicts the first of them, so it counts too.
    count = 1 + min(_shared_end(ids, row) for row in (*experts, *novices))
    return Item(ids, min(count, len(ids)), tuple(experts), tuple(novices), source.trained_expert)


def _shared_end(one: Row, other: Row) -> int:
    length = 0
    while length < min(len(one), len(other)) - 1 and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
