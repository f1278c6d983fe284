"""What a pack's files do not hold, made of what they do.

People have texts without questions, questions without texts, answers without choices, or two lists of prompts. Each gap
is filled in one way, from the pack alone and always alike, and said in ``Concept.made``. Nothing that group V asks goes
into what an edit may train on.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from ..editing.errors import counted
from .concept import Concept, ContrastPair, ForgetText, OpenQuestion, Prompt, Question, RetainText
from .drawing import drawn
from .words import plain

Text = TypeVar("Text", ForgetText, RetainText)

CHOICES = 4
"""Choices of a question that is made, the right one with them."""
MOST_CHOICES = 8
MOST_QUESTIONS = 200
"""Questions made of texts, a split and a group; open prompts made of questions."""
MOST_READ = 300
"""Texts of a split and group that are compared with each other for such questions, and questions whose answers others
are set beside."""
MOST_WORDS = 1_500_000
"""Words of a pack's forget texts, and of its retain texts, above which windows of them are drawn."""
MOST_BYTES = 32 * MOST_WORDS
"""Bytes of a file above which windows are drawn as it is read; its texts are not held."""
WINDOW = 300
"""Words of a window."""
LONGEST_WORD = 64
"""Characters of a word, on average, that a window has room for; scripts without spaces are one long word."""
MOST_PAIRS = 256
"""Contrast pairs made of texts."""
READ, ASKED = 24, 12
"""Words of a text that stand in a question made of it, at most, and words of each of its choices."""
ASK, ANSWER = "Question: ", "Answer:"
SENTENCE_ENDS = "?.!？。！؟"
"""Characters after which the answer is another sentence."""
NAME = re.compile(r"(?<=\S )[A-Z]\w+(?:[ -][A-Z]\w+)*")
"""A name within a sentence: words that begin with a capital."""


def completed(concept: Concept) -> Concept:
    """The pack with what its uses need and its files do not hold.

    Example:
        >>> from excise import load_concept
        >>> load_concept("builtin:potions").made
        ()
    """
    steps: Sequence[Callable[[Concept], Concept]] = (
        (_choices, _forget_texts, _retain_texts, _continuations, _prompts, _contrast)
        if concept.about.kind == "knowledge"
        else (_held_out_prompts,)
        if concept.about.kind == "behaviour"
        else ()
    )
    for step in steps:
        concept = step(concept)
    return concept


def asked(prompt: str) -> str:
    """A bare question as a model without a chat template is asked it; a sentence to be completed stays as it is."""
    return f"{ASK}{prompt}\n{ANSWER}" if prompt.rstrip()[-1:] in SENTENCE_ENDS else prompt


def bare(prompt: str) -> str:
    """A question without the words around it, as a user would ask it."""
    return prompt.strip().removeprefix(ASK.strip()).removesuffix(ANSWER).strip()


def windowed(rows: Iterable[Text], name: str, size: int = 0) -> tuple[tuple[Text, ...], tuple[str, ...]]:
    """Windows drawn from a corpus that is too large to be read whole, from as many of its texts as can be, and a sentence
    that says so; a smaller one as it is.

    Args:
        rows: The texts, which are read once and not held.
        name: The file, without its ending.
        size: Bytes of the file.
    """
    rng = random.Random(f"excise windows {name}")
    large = size > MOST_BYTES
    kept: list[Text] = []
    texts = words = held = 0
    share = 1.0
    for row in rows:
        texts += 1
        words += _length(row)
        if rng.random() > share:
            continue
        own = _windows_of(row, size, rng) if large else [row]
        kept += own
        held += sum(map(_length, own))
        if large and held > 4 * MOST_WORDS:
            kept, held, share = rng.sample(kept, k=len(kept) // 2), held // 2, share / 2
    if not large and words <= MOST_WORDS:
        return tuple(kept), ()
    if not large:
        size = sum(len(row.text) for row in kept)
        kept = [window for row in kept for window in _windows_of(row, size, rng)]
    chosen = _up_to(MOST_WORDS, kept, rng)
    return chosen, (
        f"{len(chosen)} {name} texts, windows of at most {WINDOW} words drawn from {texts} texts of {words} words",
    )


def _length(row: ForgetText | RetainText) -> int:
    return row.text.count(" ") + 1


def _windows_of(row: Text, size: int, rng: random.Random) -> list[Text]:
    """As many windows as a text's share of a corpus of ``size`` characters allows, at least one."""
    if _length(row) <= WINDOW:
        return [row]
    # Some more than are needed: windows that begin alike fall away.
    return [_window(row, rng) for _ in range(max(1, round(1.1 * MOST_WORDS * len(row.text) / size / WINDOW)))]


def _window(row: Text, rng: random.Random) -> Text:
    # Begins are drawn among characters, because splitting a whole book for each of its windows takes long.
    begin = rng.randrange(max(1, len(row.text) - WINDOW))
    begin = row.text.find(" ", begin) + 1 if begin else 0
    window = row.text[begin : begin + WINDOW * LONGEST_WORD].split(" ", WINDOW)[:WINDOW]
    about = {"id": f"{row.id}@{begin}", "text": " ".join(window), "subject": row.subject or row.id}
    return row.model_copy(update=about)


def _up_to(words: int, rows: Sequence[Text], rng: random.Random) -> tuple[Text, ...]:
    """Rows in a random order, none twice and none blank, until so many words are reached."""
    chosen: dict[str, Text] = {}
    for row in rng.sample(rows, k=len(rows)):
        if words <= 0:
            break
        if row.text.strip() and row.id not in chosen:
            chosen[row.id] = row
            words -= _length(row)
    return tuple(chosen.values())


def _choices(concept: Concept) -> Concept:
    """Choices for open questions: their own wrong answers, or the answers of those that ask most alike."""
    rows = concept.open_questions
    if not rows:
        return concept
    rng = random.Random("excise choices")
    pool = [(row, _words(row)) for row in rng.sample(rows, k=min(len(rows), MOST_READ))]
    questions, drawn_for = [], 0
    for row in rows:
        wrong = _distinct(row.perturbed_answers, row.answers)[: MOST_CHOICES - 1]
        if not wrong:
            wrong = _others(row, pool)
            drawn_for += bool(wrong)
        if wrong:
            questions.append(_question(row, wrong))
    own = len(questions) - drawn_for
    asked = ("open question", "open questions")
    made = [f"choices of {counted(drawn_for, *asked)}, drawn from the answers of others"] * bool(drawn_for)
    made += [f"choices of {counted(own, *asked)}, from wrong answers of the pack"] * bool(own)
    if left := len(rows) - len(questions):
        made.append(f"no choices for {counted(left, *asked)}, because no other answer is there")
    return replace(concept, questions=(*concept.questions, *questions), made=(*concept.made, *made))


def _words(row: OpenQuestion) -> frozenset[str]:
    return frozenset(row.prompt.casefold().split())


def _others(row: OpenQuestion, pool: Sequence[tuple[OpenQuestion, frozenset[str]]]) -> list[str]:
    """Answers of the questions that ask most alike, as long as the right one where that can be had, so that neither form
    nor length tells."""
    words, rng = _words(row), random.Random(f"excise choices {row.id}")
    near = sorted(
        (-len(words & its), abs(len(other.answer) - len(row.answer)) // 16, rng.random(), _as_if_about(row, other))
        for other, its in pool
        if other.id != row.id
    )
    return _distinct([answer for *_, answer in near], row.answers)[: CHOICES - 1]


def _as_if_about(row: OpenQuestion, other: OpenQuestion) -> str:
    """Another question's answer, with the name that it repeats from its question put to this question's."""
    own, its = _repeated(row), _repeated(other)
    # Otherwise the only choice with the name that the question asks about would be the right one.
    return other.answer.replace(its, own) if own and its else other.answer


def _repeated(row: OpenQuestion) -> str | None:
    """The subject, or the longest name in a question, where the answer repeats it."""
    named = [row.subject or "", *sorted(NAME.findall(row.prompt), key=len, reverse=True)]
    return next((name for name in named if name and name in row.answer), None)


def _question(row: OpenQuestion, wrong: Sequence[str]) -> Question:
    choices = [row.answer, *wrong]
    random.Random(f"excise order {row.id}").shuffle(choices)
    return Question(
        id=row.id,
        split=row.split,
        group=row.group,
        topic=row.topic,
        subject=row.subject,
        prompt=asked(row.prompt),
        choices=tuple(choices),
        answer=choices.index(row.answer),
    )


def _forget_texts(concept: Concept) -> Concept:
    """Questions of group T with their answers, where there is no text; what group V asks is not trained on."""
    return _told(
        concept, "forget", ("forget",), lambda q, text: ForgetText(id=q.id, text=text, group="T", subject=q.subject)
    )


def _retain_texts(concept: Concept) -> Concept:
    splits = ("retain", "neighbour")
    return _told(
        concept, "retain", splits, lambda q, text: RetainText(id=q.id, text=text, topic=q.topic, subject=q.subject)
    )


def _told(concept: Concept, file: str, splits: Sequence[str], made_of: Callable[[Question, str], Text]) -> Concept:
    """A file of texts, where the pack has none, from the questions of group T of some splits with their answers."""
    asked = [q for q in concept.questions if q.split in splits and q.group == "T"]
    if getattr(concept, file) or not asked:
        return concept
    rows = tuple(made_of(q, f"{q.prompt} {q.choices[q.answer]}") for q in asked)
    made = f"{counted(len(rows), f'{file} text', f'{file} texts')}, questions of group T with their answers"
    changed: dict[str, Any] = {file: rows, "made": (*concept.made, made)}
    return replace(concept, **changed)


def _continuations(concept: Concept) -> Concept:
    """How texts go on, where no question asks about the concept: the right one of four continuations."""
    if any(question.split == "forget" for question in concept.questions):
        return concept
    questions: list[Question] = []
    for group in ("T", "V"):
        questions += continuation_questions([row for row in concept.forget if row.group == group], "forget", group)
    if not questions:
        return concept
    if not concept.questions:
        questions += continuation_questions(concept.retain, "retain", None)
    made = f"{counted(len(questions), 'question', 'questions')}, each which of {CHOICES} passages continues a text"
    return replace(concept, questions=(*concept.questions, *questions), made=(*concept.made, made))


def continuation_questions(rows: Sequence[ForgetText | RetainText], split: str, group: str | None) -> list[Question]:
    """Questions on how texts go on, for as many as have three others to take wrong passages from.

    Args:
        group: None puts each into T or V by its subject.
    """
    rng = random.Random(f"excise continuations {split}")
    parts = [_Cut(row, *cut) for row in rows if (cut := _cut(row.text))]
    parts = rng.sample(parts, k=min(len(parts), MOST_READ))
    questions: list[Question] = []
    for part in parts:
        wrong = _distinct([other.answer for other in _likest(part, parts)], (part.answer,))[: CHOICES - 1]
        if len(questions) == MOST_QUESTIONS or len(wrong) < CHOICES - 1:
            continue
        choices = [part.answer, *wrong]
        rng.shuffle(choices)
        subject = part.row.subject or part.row.id
        questions.append(
            Question.model_validate(
                {
                    "id": f"continue-{part.row.id}",
                    "split": split,
                    "group": group or _by_hash(subject),
                    "subject": subject,
                    "prompt": part.prompt,
                    "choices": choices,
                    "answer": choices.index(part.answer),
                }
            )
        )
    return questions


class _Cut:
    """A text in two parts, and the words of each."""

    def __init__(self, row: ForgetText | RetainText, prompt: str, answer: str):
        self.row, self.prompt, self.answer = row, prompt, answer
        parts = enumerate((prompt, answer))
        self.words = frozenset((place, word) for place, part in parts for word in part.casefold().split())
        self.length = len(answer.split())


def _likest(part: _Cut, parts: Sequence[_Cut]) -> list[_Cut]:
    """Other texts, those that share the most words first, so that form and topic do not tell which one goes on."""
    near = sorted(parts, key=lambda other: (abs(part.length - other.length), -len(part.words & other.words)))
    # Some of the nearest may go on alike.
    return [other for other in near[: 8 * CHOICES] if other is not part]


def _cut(text: str) -> tuple[str, str] | None:
    """The beginning of a text and what comes next; None for a text that is too short to be cut."""
    words = text.split()
    shown = min(ASKED, len(words) // 3)
    read = min(READ, len(words) - shown)
    return (" ".join(words[:read]), " ".join(words[read : read + shown])) if shown >= 2 else None


def _by_hash(subject: str) -> str:
    return random.Random(f"excise group {subject}").choice("TV")


def _prompts(concept: Concept) -> Concept:
    """The questions on the concept that no training sees, asked openly."""
    if any(prompt.split == "concept" for prompt in concept.prompts):
        return concept
    open_to = {row.id: row for row in concept.open_questions}
    held_out = [q for q in concept.questions if q.split == "forget" and not q.id.startswith("continue-")]
    held_out = [q for q in held_out if q.group == "V"] or held_out
    rows = tuple(row for q in held_out if (row := _open_prompt(q, open_to.get(q.id))))
    if not rows:
        return concept
    few = drawn(rows, [row.subject or row.prompt for row in rows], MOST_QUESTIONS, "prompts")
    of_all = f"of {len(rows)} " if len(few) < len(rows) else ""
    prompts = counted(len(few), "open prompt, the question", f"{of_all}open prompts, the questions")
    made = f"{prompts} on the concept without their choices"
    return replace(concept, prompts=(*concept.prompts, *few), made=(*concept.made, made))


def _open_prompt(question: Question, source: OpenQuestion | None) -> Prompt | None:
    """A question asked openly, as its open form asks it where it has one."""
    prompt = source.prompt if source else bare(question.prompt)
    if not prompt:
        return None
    return Prompt(
        id=question.id,
        prompt=prompt,
        answer=question.choices[question.answer],
        other_answers=source.other_answers if source else (),
        choices=question.choices,
        subject=question.subject,
    )


def _contrast(concept: Concept) -> Concept:
    """Texts on the concept beside texts on something else."""
    texts = [row for row in concept.forget if row.group == "T"]
    if concept.contrast or not texts or not concept.retain:
        return concept
    rng = random.Random("excise contrast")
    pairs = zip(rng.sample(texts, k=len(texts)), rng.sample(concept.retain, k=len(concept.retain)), strict=False)
    rows = tuple(
        ContrastPair(id=f"{one.id}-{other.id}", positive=_beginning(one.text), negative=_beginning(other.text))
        for one, other in list(pairs)[:MOST_PAIRS]
    )
    made = f"{counted(len(rows), 'contrast pair', 'contrast pairs')}, a forget text of group T beside a retain text"
    return replace(concept, contrast=rows, made=(*concept.made, made))


def _beginning(text: str) -> str:
    return " ".join(text.split()[: READ + ASKED])


def _held_out_prompts(concept: Concept) -> Concept:
    """A quarter of a behaviour's pairs as prompts to measure on, which no direction is read from."""
    count = len(concept.contrast) // 4
    if concept.prompts or not count:
        return concept
    held_out, kept = concept.contrast[-count:], concept.contrast[:-count]
    rows = [Prompt(id=f"{pair.id}-positive", prompt=pair.positive) for pair in held_out]
    rows += [Prompt(id=f"{pair.id}-negative", prompt=pair.negative, split="neutral") for pair in held_out]
    last = "last contrast pair" if count == 1 else f"last {count} contrast pairs"
    made = f"{len(rows)} prompts to measure on, the {last}, which no direction is read from"
    return replace(concept, prompts=tuple(rows), contrast=kept, made=(*concept.made, made))


def _distinct(texts: Sequence[str], besides: Iterable[str]) -> list[str]:
    """The texts that differ from each other and from some more in more than case and spaces."""
    seen, kept = set(map(plain, besides)), []
    for text in texts:
        if plain(text) not in seen:
            seen.add(plain(text))
            kept.append(text)
    return kept
