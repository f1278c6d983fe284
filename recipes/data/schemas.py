"""What rows say whose columns are called as known data sets call them, or as the user maps them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...artifacts.files.opened import Unreadable
from ...artifacts.files.parsed import parse_json
from ...artifacts.sources.tables import SourceRow
from ...editing.errors import ConceptError, RequestError, counted, nearest

Columns = Mapping[str, Any]
FIELDS = (
    "text", "question", "choices", "answer", "wrong", "continuation", "paraphrase", "paraphrased_answer",
    "subject", "topic", "level", "group",
)  # fmt: skip
"""What a map can name columns for."""


@dataclass(frozen=True)
class Item:
    """What one row says. A text, a prompt, or a prompt with choices, an answer or a continuation."""

    text: str = ""
    prompt: str = ""
    choices: tuple[str, ...] = ()
    answer: str = ""
    """The right one of the choices, where there are any."""
    other_answers: tuple[str, ...] = ()
    """Further right answers of a question that is answered in free words."""
    continuation: str = ""
    wrong: tuple[str, ...] = ()
    """Wrong answers of a question that is answered in free words."""
    paraphrase: str | None = None
    paraphrased_answer: str | None = None
    subject: str | None = None
    topic: str | None = None
    level: str | None = None
    group: str | None = None
    in_order: bool = True
    """Whether the choices stand as the source asks them; where it does not, the right one comes first."""
    turns: int = 1
    """Questions of a chat, of which the first stands here."""

    @property
    def form(self) -> str:
        """``choices``, ``answer``, ``continuation``, ``prompt`` or ``text``."""
        return next((name for name in ("choices", "answer", "continuation", "prompt") if getattr(self, name)), "text")


@dataclass(frozen=True)
class Schema:
    """Columns by which a kind of row is known, and how it is read."""

    needs: tuple[str, ...]
    """Columns that all must be there; ``a|b`` is met by either."""
    read: Callable[[Columns], Item]

    def fits(self, columns: Columns) -> bool:
        return not self.missing(columns)

    def missing(self, columns: Columns) -> list[str]:
        """Needs that the columns do not meet."""
        return [need for need in self.needs if not any(name in columns for name in need.split("|"))]

    def checked(self, columns: Columns) -> Item:
        """What a row says.

        Raises:
            Unreadable: A column is missing, or holds something else.
        """
        if missing := self.missing(columns):
            has = ", ".join(map(str, columns)) or "none"
            raise Unreadable(f"has no column {missing[0].replace('|', ' or ')}; its columns: {has}")
        return self.read(columns)


class Watched(dict[str, Any]):
    """A row's columns, which notes those that were read; asking whether there is one is no reading."""

    def __init__(self, columns: Columns, read: set[str]):
        super().__init__(columns)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        return self[name]


def unread_columns(rows: Sequence[SourceRow], read: set[str], most: int = 8) -> list[str]:
    """A sentence on the columns that hold something and were not read, if there are any."""
    held = dict.fromkeys(
        name for row in rows for name, value in row.columns.items() if value is not None and value != ""
    )
    left = [str(name) for name in held if name not in read]
    if not left:
        return []
    more = f" and {len(left) - most} more" if len(left) > most else ""
    said = counted(len(left), "column holds data and was not read", "columns hold data and were not read")
    return [f"{said}: {', '.join(left[:most])}{more}"]


def read_items(
    rows: Sequence[SourceRow],
    source: str,
    mapping: Mapping[str, tuple[str, ...]] | None = None,
    read: set[str] | None = None,
) -> list[tuple[SourceRow, Item]]:
    """What each row of a source says; all rows are read by the schema that the first one has.

    Args:
        mapping: Columns by field, where the user names them.
        read: Gets the names of the columns that were read.

    Raises:
        RequestError: No schema fits, and no map was given.
        ConceptError: A row does not hold what the first one does.
    """
    schema = mapped_schema(mapping) if mapping else schema_of(rows[0].columns)
    if schema is None:
        listed = ", ".join(map(str, rows[0].columns))
        example = next(iter(rows[0].columns), "COLUMN")
        raise RequestError(
            f"{source} has the columns {listed}, which are of no known form; say what they are, e.g. --map text={example}"
            f" or --map question={example},answer=COLUMN (fields: {', '.join(FIELDS)})"
        )
    items, watched = [], set[str]() if read is None else read
    for row in rows:
        try:
            items.append((row, schema.checked(Watched(row.columns, watched))))
        except Unreadable as error:
            raise ConceptError(f"{row.place}: {error}; correct the row or remove it") from error
    return _with_answers(items)


def schema_of(columns: Columns) -> Schema | None:
    """The first schema whose columns are there."""
    return next((schema for schema in SCHEMAS.values() if schema.fits(columns)), None)


def parse_map(text: str) -> dict[str, tuple[str, ...]]:
    """A map such as ``question=prompt,choices=a+b+c+d,answer=key``: columns by field.

    Raises:
        RequestError: It has another form, or a field that there is not.
    """
    mapping: dict[str, tuple[str, ...]] = {}
    for part in text.split(","):
        field, equals, columns = (word.strip() for word in part.partition("="))
        if not equals or not columns:
            raise RequestError(f"--map: {part!r} is not FIELD=COLUMN; write e.g. --map question=prompt,answer=solution")
        if field not in FIELDS:
            raise RequestError(f"--map: no field {field!r}{nearest(field, list(FIELDS))}; fields: {', '.join(FIELDS)}")
        mapping[field] = tuple(column.strip() for column in columns.split("+"))
    if "text" not in mapping and "question" not in mapping:
        raise RequestError("--map names neither text nor question; add one, e.g. --map text=COLUMN")
    return mapping


def mapped_schema(mapping: Mapping[str, tuple[str, ...]]) -> Schema:
    """How rows are read whose columns the user names."""

    def read(columns: Columns) -> Item:
        def text(field: str) -> str:
            return "\n\n".join(_text(columns, name) for name in mapping[field]) if field in mapping else ""

        def texts(field: str) -> tuple[str, ...]:
            names = mapping.get(field, ())
            return _list(columns, names[0]) if len(names) == 1 else tuple(_text(columns, name) for name in names)

        about: dict[str, Any] = {name: _named(columns, mapping[name][0]) for name in ("subject", "topic", "level", "group",
                 "paraphrase", "paraphrased_answer") if name in mapping}  # fmt: skip
        prompt = text("question")
        if not prompt:
            return Item(text=text("text"), **about)
        if "choices" in mapping:
            return Item(prompt=prompt, choices=texts("choices"), answer=_raw(columns, mapping, "answer"), **about)
        return Item(prompt=prompt, answer=text("answer"), wrong=texts("wrong") if "wrong" in mapping else (),
                    continuation=text("continuation"), **about)  # fmt: skip

    return Schema(tuple(name for names in mapping.values() for name in names), read)


def _raw(columns: Columns, mapping: Mapping[str, tuple[str, ...]], field: str) -> str:
    if field not in mapping:
        raise RequestError(
            "--map has choices and no answer; add answer=COLUMN with an index, a letter or the right text"
        )
    return _answer(columns, mapping[field][0])


def _chat(columns: Columns) -> Item:
    turns = chat_turns(columns)
    asked = [n for n, (role, _) in enumerate(turns) if role == "user"]
    if not asked:
        raise Unreadable("the chat has no turn of a user")
    prompt = turns[asked[0]][1]
    answer = next((content for role, content in turns[asked[0] :] if role == "assistant"), "")
    return Item(prompt=prompt, answer=answer, turns=len(asked))


CHATS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system"}  # fmt: skip
"""Roles as ShareGPT and its kin call them."""


def chat_turns(columns: Columns) -> list[tuple[str, str]]:
    """Role and text of each turn: OpenAI's ``role`` and ``content``, or ShareGPT's ``from`` and ``value``.

    Raises:
        Unreadable: It is no list of such turns, or a turn calls a tool, holds an image, or has another role.
    """
    name = next(name for name in CHATS if name in columns)
    turns = columns[name]
    if not isinstance(turns, list) or not turns:
        raise Unreadable(f"{name} is not a list of turns")
    return [_turn(name, turn) for turn in turns]


def _turn(name: str, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise Unreadable(f"a turn of {name} is {kind_of(turn)}, not an object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise Unreadable(f"a turn of {name} has the role {role!r}; {', '.join(sorted(set(ROLES)))} are read")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unreadable(f"a turn of {name} calls a tool, which is not learned; remove the row")
    if isinstance(content, list):
        # A list of parts, as chats with images have it.
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise Unreadable(f"a turn of {name} holds something other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Unreadable(f"the content of a turn of {name} is {kind_of(content)}, not a text")
    return ROLES[role.lower()], content


def _arc(columns: Columns) -> Item:
    choices = columns["choices"]
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise Unreadable("choices is no object of text and label")
    texts, labels = _list(choices, "text"), _list(choices, "label")
    key = _answer(columns, "answerKey")
    if len(texts) != len(labels) or key not in labels:
        raise Unreadable(f"answerKey {key!r} is none of the labels {', '.join(labels)}")
    return Item(prompt=_text(columns, "question"), choices=texts, answer=texts[labels.index(key)])


def _options(columns: Columns) -> Item:
    name = _first(columns, "choices|options")
    answer = _answer(columns, _first(columns, "answer|answer_index|answer_idx|label|target"))
    # MMLU calls subject what a question's field is, not whom or what it asks about.
    topic = _named(columns, "subject") if "question" in columns else _named(columns, "topic")
    return Item(
        prompt=_text(columns, _first(columns, "question|prompt")),
        choices=_list(columns, name),
        answer=answer,
        topic=topic,
        subject=_named(columns, "subject") if "prompt" in columns else None,
        group=_group(columns),
    )


def _lettered(columns: Columns) -> Item:
    choices = tuple(_text(columns, letter).strip() for letter in "ABCD")
    return Item(prompt=_text(columns, "question"), choices=choices, answer=_answer(columns, "answer"))


def _sciq(columns: Columns) -> Item:
    right = _text(columns, "correct_answer").strip()
    wrong = [_text(columns, name).strip() for name in sorted(columns) if str(name).startswith("distractor")]
    return Item(prompt=_text(columns, "question"), choices=(right, *wrong), answer=right, in_order=False)


def _popqa(columns: Columns) -> Item:
    answers = _list(columns, "possible_answers")
    if not answers:
        raise Unreadable("possible_answers is empty")
    about: dict[str, Any] = {"subject": _named(columns, "subj"), "topic": _named(columns, "prop")}
    return Item(prompt=_text(columns, "question"), answer=answers[0], other_answers=answers[1:], **about)


def _several(columns: Columns) -> Item:
    """A question with a list of right answers: TriviaQA as RWKU has it, and its kin."""
    answers = tuple(filter(None, _list(columns, "answers")))
    if not answers:
        raise Unreadable("answers is empty")
    about: dict[str, Any] = {"subject": _named(columns, "subject"), "topic": _named(columns, "topic")}
    return Item(prompt=_text(columns, "question"), answer=answers[0], other_answers=answers[1:], **about)


def _worked(columns: Columns) -> Item:
    """A question after examples that think aloud, as BIG-Bench Hard has them."""
    front = f"{_text(columns, 'cot').strip()}\n\n{GO_ON}\nQ: "
    about: dict[str, Any] = {"subject": _named(columns, "subject"), "topic": _named(columns, "task")}
    answer = _text(columns, "answer", number=True)
    return Item(prompt=f"{front}{_text(columns, 'question')}", answer=answer, **about)


GO_ON = "Answer the next question as the examples do, and end with 'so the answer is'."


def _truthful(columns: Columns) -> Item:
    """TruthfulQA: the choices of its single-answer form, of which one is labelled 1."""
    found = columns["mc1_targets"]
    if not isinstance(found, dict) or not {"choices", "labels"} <= found.keys():
        raise Unreadable("mc1_targets is no object of choices and labels")
    choices, labels = _list(found, "choices"), found["labels"]
    if not isinstance(labels, list) or len(labels) != len(choices) or labels.count(1) != 1:
        raise Unreadable("labels of mc1_targets is no list with one 1 and a 0 for each other choice")
    right = labels.index(1)
    rest = (*choices[:right], *choices[right + 1 :])
    return Item(
        prompt=_text(columns, "question"), choices=(choices[right], *rest), answer=choices[right], in_order=False
    )


def _answered(columns: Columns) -> Item:
    """A question with its answer in words: TOFU, MUSE, RWKU, prompt and completion."""
    wrong = next((_list(columns, name) for name in ("perturbed_answer", "perturbed_answers") if name in columns), ())
    return Item(
        prompt=_text(columns, _first(columns, "question|query|prompt")),
        answer=_text(columns, _first(columns, "answer|completion|response|output"), number=True),
        wrong=wrong,
        paraphrase=_named(columns, "paraphrased_question"),
        paraphrased_answer=_named(columns, "paraphrased_answer"),
        subject=_named(columns, "subject"),
        topic=_named(columns, "topic"),
        level=_named(columns, "level"),
        group=_group(columns),
    )


def _passage(columns: Columns) -> Item:
    continuation = _text(columns, _first(columns, "gt|continuation"))
    return Item(prompt=_text(columns, "prompt"), continuation=continuation)


def _alpaca(columns: Columns) -> Item:
    return Item(prompt=alpaca_prompt(columns), answer=_text(columns, "output"))


def alpaca_prompt(columns: Columns) -> str:
    """Instruction and input, in two paragraphs where there is an input."""
    return "\n\n".join(filter(str.strip, (_text(columns, "instruction"), _text(columns, "input"))))


def _plain(columns: Columns) -> Item:
    names = [name for name in ("title", "abstract") if columns.get(name)] if "text" not in columns else []
    names.append(_first(columns, "text|content|abstract|passage|article|document"))
    body = "\n\n".join(dict.fromkeys(_text(columns, name) for name in names))
    subject = next((value for name in ("subject", "doi", "title") if (value := _named(columns, name))), None)
    return Item(text=body, subject=subject, topic=_named(columns, "topic"), group=_group(columns))


def _prompt(columns: Columns) -> Item:
    return Item(
        prompt=_text(columns, _first(columns, "prompt|goal|instruction|question|query|Behavior|forbidden_prompt"))
    )


SCHEMAS: dict[str, Schema] = {
    "chat": Schema(("|".join(CHATS),), _chat),
    "ARC": Schema(("question", "choices", "answerKey"), _arc),
    "multiple choice": Schema(
        ("question|prompt", "choices|options", "answer|answer_index|answer_idx|label|target"), _options
    ),
    "lettered columns": Schema(("question", "A", "B", "C", "D", "answer"), _lettered),
    "SciQ": Schema(("question", "correct_answer", "distractor1"), _sciq),
    "PopQA": Schema(("question", "possible_answers"), _popqa),
    "TruthfulQA": Schema(("question", "mc1_targets"), _truthful),
    "several answers": Schema(("question", "answers"), _several),
    "passages": Schema(("prompt", "gt|continuation"), _passage),
    "Alpaca": Schema(("instruction", "output"), _alpaca),
    "worked examples": Schema(("question", "cot", "answer"), _worked),
    "questions and answers": Schema(("question|query|prompt", "answer|completion|response|output"), _answered),
    "texts": Schema(("text|content|abstract|passage|article|document",), _plain),
    "prompts": Schema(("prompt|goal|instruction|question|query|Behavior|forbidden_prompt",), _prompt),
}
"""Tried in this order; ``messages`` wins over other columns."""


def _with_answers(items: list[tuple[SourceRow, Item]]) -> list[tuple[SourceRow, Item]]:
    """Answers to questions with choices as the texts that they stand for.

    Whether answers are texts or places is decided for all rows at once: among choices that are numbers, "2" could be
    both.
    """
    asked = [item for _, item in items if item.choices]
    by_text = all(item.answer in item.choices for item in asked)
    found = []
    for row, item in items:
        if item.choices and not by_text:
            try:
                place = _place(item.answer, item.choices)
            except Unreadable as error:
                raise ConceptError(f"{row.place}: {error}; correct the row or remove it") from error
            item = Item(**{**item.__dict__, "answer": item.choices[place]})
        found.append((row, item))
    return found


def _place(answer: str, choices: tuple[str, ...]) -> int:
    if re.fullmatch("-?[0-9]{1,9}", answer):
        place = int(answer)
    elif len(answer) == 1 and answer.isascii() and answer.isalpha():
        place = ord(answer.upper()) - ord("A")
    elif answer in choices:
        place = choices.index(answer)
    else:
        raise Unreadable(f"answer {answer[:60]!r} is no index, no letter and none of the {len(choices)} choices")
    if not 0 <= place < len(choices):
        raise Unreadable(f"answer {answer} is out of range; there are {len(choices)} choices, counted from 0 or A")
    return place


def _first(columns: Columns, names: str) -> str:
    return next(name for name in names.split("|") if name in columns)


def _text(columns: Columns, name: str, *, number: bool = False) -> str:
    """A text; blank where the column is missing or empty."""
    value = columns.get(name)
    if value is None:
        return ""
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Unreadable(f"{name} is {kind_of(value)}, not a text")
    return value


def _answer(columns: Columns, name: str) -> str:
    value = columns.get(name)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value).strip()
    raise Unreadable(f"{name} is {kind_of(value)}, not an index, a letter or a text")


def _list(columns: Columns, name: str) -> tuple[str, ...]:
    value = columns.get(name)
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except Unreadable as error:
            raise Unreadable(
                f"{name} is a text and not a list; where each has a column of its own, give --map {name}=a+b+c"
            ) from error
    if not isinstance(value, list):
        raise Unreadable(f"{name} is {kind_of(value)}, not a list")
    return tuple(_text({name: item}, name, number=True).strip() for item in value)


def _named(columns: Columns, name: str) -> str | None:
    """An optional short text; None where it is blank. Numbers name things too."""
    # What is left aside is not read: columns of these names hold other things in many data sets.
    value = dict(columns.items()).get(name)
    if not isinstance(value, int | str) or isinstance(value, bool):
        return None
    return str(columns[name]).strip() or None


def _group(columns: Columns) -> str | None:
    return _named(columns, "group") if dict(columns.items()).get("group") in ("T", "V") else None


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "missing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
