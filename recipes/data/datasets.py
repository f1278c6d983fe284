"""Fine-tuning data: chats, prompts with completions, or plain texts, as sequences with the tokens to learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...artifacts.models.hub import HUB_ID
from ...artifacts.sources.hub_sets import HUB
from ...artifacts.sources.source import read_source
from ...artifacts.sources.tables import READERS
from ...editing.errors import RequestError
from ...eval.concept import TrainingRow
from ...eval.inference.chat import render_messages
from ..common.examples import Example
from ..common.tokens import encode, pieces
from .schemas import parse_map, unread_columns
from .training_rows import training_rows

MOST_ROWS = 1_000_000
"""Rows that are drawn of a larger set; no run here takes as many."""


@dataclass(frozen=True)
class TuningData:
    """Rows to fine-tune on, and where they came from."""

    rows: tuple[TrainingRow, ...]
    name: str
    """Their name in publications: a file's name or a Hub id, without a local path."""
    sha256: str | None = None
    """SHA-256 of the file; None for a data set on the Hub."""
    notes: tuple[str, ...] = ()
    """What of it was not read, one sentence each."""


@dataclass(frozen=True)
class Encoded:
    """Sequences to learn, and the number of sequences left out because they do not fit the context."""

    examples: list[Example]
    too_long: int


def find_data(ref: str, data_map: str | None = None) -> TuningData:
    """Rows of a file, a folder or a data set on the Hub.

    Args:
        ref: A .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder, or a data set as ORG/NAME[@REVISION], its
            ``train`` split, or ``hub:ORG/NAME[:CONFIGURATION][:SPLIT][@REVISION]``.
        data_map: Columns of a set of unknown form, as ``question=COLUMN,answer=COLUMN`` or ``text=COLUMN``.

    Raises:
        RequestError: There is no such file or data set.
        ConceptError: Rows are wrong; the message lists them.
    """
    path = Path(ref)
    if not path.exists() and not ref.startswith(HUB):
        if ref.startswith((".", "/")) or path.suffix in READERS or not HUB_ID.fullmatch(ref):
            raise RequestError(f"{ref} is no file; give a file, a folder, or a data set on the Hub as hub:ORG/NAME")
        ref = f"{HUB}{ref}"
    source = read_source(ref, MOST_ROWS)
    left = "" if source.total == len(source.rows) else f" ({len(source.rows)} of its {source.total} rows)"
    read = set[str]()
    rows = training_rows(source.rows, source.shown, parse_map(data_map) if data_map else None, read)
    notes = (*source.notes, *(f"{source.shown}: {line}." for line in unread_columns(source.rows, read)))
    return TuningData(rows, f"{source.name}{left}", source.sha256, notes)


def encoded(rows: Sequence[TrainingRow], tokenizer: Any, limit: int) -> Encoded:
    """Rows as token ids. In chats and completions, only the model's reply and its end token are learned.

    Long texts are cut into pieces, and all pieces are learned. A chat or completion that is too long is left out and
    counted.

    Args:
        rows: Rows of one data set.
        tokenizer: Tokenizer of the model to train.
        limit: Tokens per sequence, at most.

    Raises:
        RequestError: The data are chats, and the tokenizer's chat template is missing or unsuitable.
    """
    examples, too_long = [], 0
    for row in rows:
        if row.text is not None:
            examples += [
                Example(piece, 1) for piece in pieces(encode(tokenizer, row.text, True), limit) if len(piece) > 1
            ]
            continue
        for example in _turns(row, tokenizer) if row.messages else [_completed(row, tokenizer)]:
            if len(example.ids) <= limit:
                examples.append(example)
            else:
                too_long += 1
    return Encoded(examples, too_long)


def _turns(row: TrainingRow, tokenizer: Any) -> list[Example]:
    """One sequence for each assistant turn, with all messages before it."""
    if not tokenizer.chat_template:
        raise RequestError("the data are chats and the tokenizer has no chat template; give prompts with completions")
    messages = [message.model_dump() for message in row.messages]
    examples = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, whole = (
                list(encode(tokenizer, render_messages(tokenizer, part, reply=reply), False))
                for part, reply in ((messages[:place], True), (messages[: place + 1], False))
            )
            if whole[: len(before)] != before:
                raise RequestError(
                    "the tokenizer's chat template renders a prompt differently once it is answered, so the reply's "
                    "tokens "
                    "cannot be separated; give prompts with completions"
                )
            examples.append(Example(tuple(whole), len(before)))
    return examples


def _completed(row: TrainingRow, tokenizer: Any) -> Example:
    assert row.prompt is not None and row.completion is not None
    start = len(encode(tokenizer, row.prompt, True))
    ids = encode(tokenizer, row.prompt + row.completion, True)
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    # The tokenizer may join the end of the prompt to the completion; its last token is learned in any case.
    return Example((*ids, *end), min(start, len(ids) - 1))
