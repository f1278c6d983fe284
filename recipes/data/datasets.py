"""Fine-tuning data: chats, prompts with completions, or plain texts, as sequences with the tokens to learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...artifacts.concepts import read_training
from ...artifacts.files.opened import sha256_of
from ...editing.errors import ConceptError, RequestError, one_line
from ...eval.concept import TrainingRow
from ...eval.inference.chat import render_messages
from ..common.examples import Example
from ..common.tokens import encode, pieces


@dataclass(frozen=True)
class TuningData:
    """Rows to fine-tune on, and where they came from."""

    rows: tuple[TrainingRow, ...]
    name: str
    """Their name in publications: a file's name or a Hub id, without a local path."""
    sha256: str | None = None
    """SHA-256 of the file; None for a data set on the Hub."""


@dataclass(frozen=True)
class Encoded:
    """Sequences to learn, and the number of sequences left out because they do not fit the context."""

    examples: list[Example]
    too_long: int


def find_data(ref: str) -> TuningData:
    """Rows of a JSON lines file, or of a data set on the Hub (its ``train`` split).

    Raises:
        RequestError: There is no such file or data set.
        ConceptError: Rows are wrong; the message lists them.
    """
    path = Path(ref)
    if path.is_file():
        return TuningData(read_training(path), path.name, sha256_of(path))
    if path.exists() or ref.startswith((".", "/")) or path.suffix in (".json", ".jsonl", ".csv"):
        raise RequestError(f"{ref} is no file; give a .jsonl file or the id of a data set on the Hub")
    return _from_hub(ref)


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


def _from_hub(ref: str) -> TuningData:
    from datasets import load_dataset

    name, _, revision = ref.partition("@")
    try:
        rows = load_dataset(name, split="train", revision=revision or None)
    except Exception as error:  # the library raises dozens of kinds
        raise RequestError(
            f"no data set {ref} could be read ({one_line(error)}); give a .jsonl file or a Hub id"
        ) from error
    try:
        return TuningData(tuple(TrainingRow.model_validate(row) for row in rows), ref)
    except ValidationError as error:
        raise ConceptError(
            f"data set {ref} has rows of another form ({error.errors()[0]['msg']}); each is messages, prompt and "
            "completion, or text"
        ) from error
