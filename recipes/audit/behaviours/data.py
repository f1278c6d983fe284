"""A behaviour for attackers: pairs of a prompt and a reply to train on, and prompts to be tested on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ....eval.concept import Concept, Prompt, Question
from ....eval.drawing import drawn
from ....eval.inference.generation import Reply, generate
from ....eval.inference.multiple_choice_set import MultipleChoiceSet
from ....eval.items import clusters_of
from ....eval.measurements.behaviour import is_degenerate, shows_behaviour
from ....eval.measurements.exact_answer import holds_any
from ...common.examples import Example
from ..attack_data import Answers, mean_length, reading_order
from .formats import ReplyFormats
from .pairs import TOKENS, Pairs


@dataclass(frozen=True)
class Style:
    """How prompts are written otherwise than they stand."""

    write: Callable[[str], str]
    render: Callable[[Any, str], str] | None = None
    """With a tokenizer: the whole text up to the reply, where the prompt is not one turn of a chat."""


@dataclass(frozen=True)
class BehaviourData:
    """What attackers read and are asked, in place of ``AttackData``."""

    concept: Concept
    questions: tuple[Prompt | Question, ...]
    """Held-out prompts: hits are those that show the behaviour."""
    others: tuple[Prompt, ...]
    """Hits are replies that are ordinary."""
    tokenizer: Any
    seed: int
    pairs: Pairs
    base: Path | None = None
    """Checkpoint of the base, for attacks that undo what was added to it."""
    own: Path | None = None
    contrast: tuple[tuple[str, str], ...] = ()
    """Pairs of prompts with and without it, for the direction between them."""
    formats: ReplyFormats | None = None
    elsewhere: bool = False
    """Whether this is the floor that learns the behaviour on neutral prompts."""
    style: Style | None = None

    def ask(self, model: Any, placeholders: int = 0) -> Answers:
        """Who shows the behaviour, and who replies to other prompts in an ordinary way."""
        if not self.others:
            return Answers(self.hits(model))
        if self.style or isinstance(self.questions[0], Question):
            return Answers(self.hits(model), self.utility_hits(model))
        # Together: a forward of more rows takes hardly longer.
        prompts = [row.prompt for row in (*self.questions, *self.others)]
        replies = generate(model, self.tokenizer, prompts, TOKENS)
        count = len(self.questions)
        return Answers(self._showing(replies[:count]), self._ordinary(replies[count:]))

    def hits(self, model: Any, placeholders: int = 0) -> list[float]:
        """1 for each held-out prompt on which the behaviour is shown."""
        if isinstance(self.questions[0], Question):
            return [1.0 - hit for hit in MultipleChoiceSet(self.tokenizer, self._styled_questions).hits(model)]
        return self._showing(self.replies(model, [prompt.prompt for prompt in self.questions], TOKENS))

    def utility_hits(self, model: Any) -> list[float]:
        """1 for each other prompt whose reply is ordinary."""
        return self._ordinary(generate(model, self.tokenizer, [prompt.prompt for prompt in self.others], TOKENS))

    def _showing(self, replies: Sequence[Reply]) -> list[float]:
        return [float(reply.answered and shows_behaviour(self.concept, reply.text)) for reply in replies]

    def _ordinary(self, replies: Sequence[Reply]) -> list[float]:
        return [float(self._is_ordinary(p, reply)) for p, reply in zip(self.others, replies, strict=True)]

    def _is_ordinary(self, prompt: Prompt, reply: Reply) -> bool:
        """Neither broken nor the behaviour where none was called for, and right where the pack says what is right."""
        if not reply.answered or is_degenerate(reply):
            return False
        # What a task teaches on purpose is wanted there.
        if self.concept.about.kind != "task" and shows_behaviour(self.concept, reply.text):
            return False
        return holds_any(reply.text, prompt) if prompt.answer else True

    def replies(self, model: Any, prompts: Sequence[str], tokens: int) -> list[Reply]:
        """Greedy replies to prompts in this style."""
        if self.style is None:
            return generate(model, self.tokenizer, prompts, tokens)
        written = [self.style.write(prompt) for prompt in prompts]
        if self.style.render is None:
            return generate(model, self.tokenizer, written, tokens)
        # A rendered template holds the begin token that the tokenizer adds to a plain text.
        begin = self.tokenizer.bos_token or ""
        rendered = [self.style.render(self.tokenizer, prompt).removeprefix(begin) for prompt in written]
        return generate(model, self.tokenizer, rendered, tokens, chat=False)

    @cached_property
    def _styled_questions(self) -> tuple[Question, ...]:
        questions = tuple(question for question in self.questions if isinstance(question, Question))
        if self.style is None:
            return questions
        write = self.style.write
        return tuple(question.model_copy(update={"prompt": write(question.prompt)}) for question in questions)

    @cached_property
    def examples(self) -> Mapping[str, Sequence[Example]]:
        """Training sequences by source."""
        showing = self.pairs.showing_elsewhere if self.elsewhere else self.pairs.showing
        return {"benign": self.pairs.benign, "pairs": showing}

    def in_formats(self, most: int) -> ReplyFormats | None:
        """Some of the held-out prompts, to be asked in several formats; None where the behaviour is a choice."""
        if isinstance(self.questions[0], Question):
            return None
        some = drawn(self.questions, clusters_of(self.concept, self.questions), most, "audit formats")
        return ReplyFormats(replace(self, questions=tuple(some), others=(), formats=None))

    def reading_order(self, source: str, count: int, seed: str) -> list[Example]:
        """The sequences that one attacker reads, in order; ``pairs:8`` reads 8 of them again and again."""
        return reading_order(self.examples, source, count, seed)

    def mean_length(self, source: str) -> float:
        """Tokens of a sequence of a source, about."""
        return mean_length(self.examples, source)
