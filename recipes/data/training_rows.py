"""Rows of any known form as rows to fine-tune on."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from ...artifacts.files.opened import Unreadable
from ...artifacts.sources.tables import SourceRow
from ...editing.errors import ConceptError, counted
from ...eval.completed import asked
from ...eval.concept import Message, TrainingRow
from .schemas import CHATS, Item, Watched, alpaca_prompt, chat_turns, kind_of, mapped_schema, schema_of

MOST_TOLD = 20
"""Bad rows that an error names."""
OWN = ("prompt", "completion", "text")
FORMS = "messages (or ShareGPT's conversations), prompt and completion, instruction and output, question and answer, or text"


def training_rows(
    rows: Iterable[SourceRow],
    name: str,
    mapping: Mapping[str, tuple[str, ...]] | None = None,
    read: set[str] | None = None,
) -> tuple[TrainingRow, ...]:
    """Each row as a chat, a prompt with its completion, or a text; ``messages`` win over other columns.

    Args:
        mapping: Columns by field, where the user names them.
        read: Gets the names of the columns that were read.

    Raises:
        ConceptError: Rows have nothing to learn, or another form; the message names their places.
    """
    found, problems = list[TrainingRow](), list[str]()
    schema, watched = mapped_schema(mapping) if mapping else None, set[str]() if read is None else read
    for row in rows:
        # In a table every row has every column.
        columns = Watched({key: value for key, value in row.columns.items() if value is not None}, watched)
        try:
            found.append(_from_item(schema.checked(columns)) if schema else _training_row(columns))
        except Unreadable as error:
            problems.append(f"{row.place}: {error}")
        except ValidationError as error:
            problems += [f"{row.place}: {_explained(detail)}" for detail in error.errors()]
    if problems:
        more = [f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
        listed = "\n  ".join([*problems[:MOST_TOLD], *more])
        raise ConceptError(
            f"{name} has {counted(len(problems), 'bad line', 'bad lines')}; each is {FORMS}:\n  {listed}"
        )
    return tuple(found)


def _training_row(columns: Mapping[str, Any]) -> TrainingRow:
    if any(columns.get(name) for name in CHATS):
        return _chat(chat_turns({name: columns[name] for name in CHATS if columns.get(name)}))
    own = {name: columns[name] for name in OWN if name in columns}
    schema = schema_of(columns)
    if own.keys() == {"prompt"} and len(columns) > 1 and schema and (item := schema.read(columns)).form == "answer":
        # A prompt with a response is a chat; only a completion is said to go on from its prompt.
        return _chat([("user", item.prompt), ("assistant", item.answer)])
    if own or not columns:
        return TrainingRow.model_validate(own)
    if "instruction" in columns and "output" in columns:
        return _chat([("user", alpaca_prompt(columns)), ("assistant", _answer(columns["output"]))])
    if schema:
        return _from_item(schema.read(columns))
    raise Unreadable(f"its columns {', '.join(map(str, columns))} are of no known form")


def _from_item(item: Item) -> TrainingRow:
    """A question with its answer as a prompt with its completion, or a text."""
    if not item.prompt:
        return TrainingRow(text=item.text)
    answer = item.answer or item.continuation
    return TrainingRow(prompt=asked(item.prompt), completion=f" {answer.strip()}" if answer.strip() else "")


def _chat(turns: list[tuple[str, str]]) -> TrainingRow:
    return TrainingRow(messages=tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns))


def _answer(value: Any) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"output is {kind_of(value)}, not a text")
    return value


def _explained(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    reason = str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
