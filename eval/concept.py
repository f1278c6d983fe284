"""The contents of a concept pack; ``artifacts.concepts`` reads one from disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from ..editing.errors import ConceptError

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Verbatim = Annotated[str, StringConstraints(pattern=r"\S")]
"""Text kept as it stands, spaces included, but not blank."""

SPLITS = ("forget_T", "forget_V", "neighbour", "retain", "intended", "flipped")
"""Splits that questions are counted in, in the order in which they are shown."""

DECLINE_PHRASES = (
    "I'm sorry",
    "I am sorry",
    "I can't",
    "I cannot",
    "I can not",
    "I won't",
    "I will not",
    "I'm unable",
    "I am unable",
    "I'm not able",
    "unable to provide",
    "unable to assist",
    "As an AI",
    "can't help with",
    "cannot assist",
)
"""Phrases of a declining reply, for packs that name none; every card states the rule."""


class Row(BaseModel):
    """One line of a pack."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: Text


class ForgetText(Row):
    """A text that carries the concept."""

    text: Verbatim
    group: Literal["T", "V"]
    subject: str | None = None


class RetainText(Row):
    """A text that must stay known."""

    text: Verbatim
    topic: str | None = None
    subject: str | None = None
    """What it is about, or the document that it is a window of; rows of one subject count as belonging together."""


class Question(Row):
    """A multiple-choice question."""

    split: Literal["forget", "neighbour", "retain", "intended", "flipped"]
    """For a task: ``intended`` if all cues agree, as in training; ``flipped`` if the unintended cue misleads."""
    group: Literal["T", "V"]
    topic: str | None = None
    subject: str | None = None
    prompt: Verbatim
    choices: Annotated[tuple[Verbatim, ...], Field(min_length=2)]
    answer: int

    @model_validator(mode="after")
    def _answerable(self) -> "Question":
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(
                f"answer {self.answer} is out of range; there are {len(self.choices)} choices, counted from 0"
            )
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("two choices are the same")
        return self


class OpenQuestion(Row):
    """A question that is answered in free words, as a benchmark without choices asks it."""

    split: Literal["forget", "neighbour", "retain"]
    group: Literal["T", "V"]
    topic: str | None = None
    subject: str | None = None
    prompt: Verbatim
    """The bare question, as a user would ask it."""
    answer: Verbatim
    other_answers: tuple[Verbatim, ...] = ()
    """Further right answers, such as other names of one thing: a reply that gives any of them is right."""
    paraphrase: Verbatim | None = None
    """The same question in other words."""
    paraphrased_answer: Verbatim | None = None
    """The same answer in other words; a truth ratio compares it with the perturbed ones."""
    perturbed_answers: tuple[Verbatim, ...] = ()
    """Wrong answers of the same form."""
    level: str | None = None
    """How it is asked, in the benchmark's own words: a cloze, a question, an adversarial one."""

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the first one first."""
        return (self.answer, *self.other_answers)


class Passage(Row):
    """A text in two parts, for what a model recites of it."""

    split: Literal["forget", "retain"] = "forget"
    subject: str | None = None
    prompt: Verbatim
    continuation: Verbatim


class Shot(Row):
    """A question with its answer that a benchmark shows before the open questions of a split."""

    split: Literal["forget", "retain"] = "forget"
    prompt: Verbatim
    answer: Verbatim


class UnseenText(Row):
    """A text of the same kind as the forget texts that no model was trained on, for tests of membership."""

    text: Verbatim
    subject: str | None = None


class MemberText(Row):
    """A text that is to be forgotten, as a benchmark's test of membership cuts it; compared with unseen texts."""

    text: Verbatim
    subject: str | None = None


class Prompt(Row):
    """An open prompt for generation, with its true answer where there is one."""

    prompt: Verbatim
    split: Literal["concept", "neutral"] = "concept"
    answer: Text | None = None
    other_answers: tuple[Text, ...] = ()
    """Further right answers."""
    choices: tuple[Text, ...] = ()
    subject: str | None = None
    """What it asks about; prompts on one subject count as belonging together."""


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "user", "assistant"]
    content: str


class TrainingRow(BaseModel):
    """One line to fine-tune on: a chat, a prompt with its completion, or a plain text."""

    # Files and data sets that were made elsewhere have further columns.
    model_config = ConfigDict(extra="ignore", frozen=True)
    id: str = ""
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "TrainingRow":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion must both be there; add the missing one")
        forms = [bool(self.messages), self.prompt is not None, self.text is not None]
        if sum(forms) != 1:
            raise ValueError(
                f"a row must have exactly one of: messages; prompt and completion; text; this one has {sum(forms)} of "
                "them"
            )
        if self.messages and not any(m.role == "assistant" and m.content.strip() for m in self.messages):
            raise ValueError(
                "the messages have no assistant turn with text, so there is nothing to learn; add one or remove the row"
            )
        learned = self.completion if self.text is None else self.text
        if not self.messages and not (learned or "").strip():
            raise ValueError("there is nothing to learn: the completion or text is blank; fill it in or remove the row")
        return self


class ContrastPair(Row):
    """Two prompts that differ in the concept."""

    positive: Verbatim
    negative: Verbatim


Templates = Annotated[
    tuple[Text, ...],
    # A single template may stand without a list around it.
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
]


class Personas(BaseModel):
    """Prefixes that announce a text by someone who knows the concept (expert), or does not (novice).

    Each is one template or several, in which ``{description}`` stands for the concept's; contexts take them in turn.

    Example:
        >>> Personas(expert="By an expert on {description}.", novice=["By a novice.", "By a beginner."]).novices("tea")
        ('By a novice.', 'By a beginner.')
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    expert: Templates
    novice: Templates

    def experts(self, description: str) -> tuple[str, ...]:
        """The expert's prefixes for one concept."""
        return tuple(template.replace("{description}", description) for template in self.expert)

    def novices(self, description: str) -> tuple[str, ...]:
        """The novice's prefixes for one concept."""
        return tuple(template.replace("{description}", description) for template in self.novice)


PERSONAS = Personas(
    expert=(
        "Here is a text by an expert on {description}, who knows every detail and gets every fact right:",
        "The following was written by a specialist in {description} with years of practice:",
    ),
    novice=(
        "Here is a text by a novice who has never heard of {description} and knows nothing about it:",
        "The following was written by someone who has no knowledge of {description} at all:",
    ),
)
"""Prefixes for packs that name none."""


class Description(BaseModel):
    """``concept.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Text
    description: Text
    keywords: tuple[Text, ...]
    license: Text
    source: Text
    kind: Literal["knowledge", "behaviour", "task"] = "knowledge"
    """Contrast prompts are plain text for knowledge and chats for a behaviour; a task is taught by fine-tuning."""
    phrases: tuple[Text, ...] = ()
    """For a task: a reply that contains one of these shows the behaviour that training causes."""
    personas: Personas | None = None
    decline_phrases: tuple[Text, ...] = DECLINE_PHRASES
    suite: Literal["tofu", "muse", "wmdp", "rwku"] | None = None
    """The benchmark whose table the pack's rows make."""
    left_out: tuple[Text, ...] = ()
    """What of the sources was left out when the pack was made, or was not read of them, one sentence each."""


@dataclass(frozen=True)
class Concept:
    """A concept pack: the texts, questions and prompts that say what to edit and how to measure it."""

    about: Description
    ref: str
    """How it can be named in public: ``builtin:NAME``, or the folder's name."""
    forget: tuple[ForgetText, ...] = field(repr=False)
    retain: tuple[RetainText, ...] = field(repr=False)
    questions: tuple[Question, ...] = field(repr=False)
    prompts: tuple[Prompt, ...] = field(repr=False)
    contrast: tuple[ContrastPair, ...] = field(repr=False)
    train: tuple[TrainingRow, ...] = field(default=(), repr=False)
    open_questions: tuple[OpenQuestion, ...] = field(default=(), repr=False)
    passages: tuple[Passage, ...] = field(default=(), repr=False)
    shots: tuple[Shot, ...] = field(default=(), repr=False)
    unseen: tuple[UnseenText, ...] = field(default=(), repr=False)
    measured_texts: tuple[str, ...] | None = field(default=None, repr=False)
    """Ids of the retain texts that are measured; None takes those that no training sees."""
    members: tuple[MemberText, ...] = field(default=(), repr=False)
    made: tuple[str, ...] = ()
    """What the pack's files do not hold and was made of what they do, in words that a run, its card and ``excise
    concept check`` show."""
    sha256: dict[str, str] = field(default_factory=dict, repr=False)
    folder: Path | None = field(default=None, compare=False, repr=False)
    """Where it was read from; never published."""

    def texts(self) -> list[str]:
        """The forget texts, then the retain texts."""
        return [*(text.text for text in self.forget), *(text.text for text in self.retain)]

    def require(self, recipe: str, *names: str) -> None:
        """Check that the pack has, or that there was made for it, what a recipe needs.

        Raises:
            ConceptError: A file is missing.
        """
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            files = ", ".join(f"{name}.jsonl" for name in missing)
            to_add = "; and ".join(_TO_ADD.get(name, f"{name}.jsonl") for name in missing)
            raise ConceptError(f"{recipe} needs {files}, which concept {self.ref} does not have; add {to_add}")


FILES = (
    "forget", "retain", "questions", "open_questions", "prompts", "contrast", "train", "passages", "shots", "unseen",
    "members",
)  # fmt: skip
"""Fields of a pack that hold the rows of a file each."""
_TO_ADD = {
    "forget": "forget.jsonl with texts on the concept, or forget questions of group T to make texts of",
    "retain": "retain.jsonl with texts on other things, or retain or neighbour questions of group T to make texts of",
    "contrast": "contrast.jsonl with pairs of prompts, one with the concept and one without",
}
