"""What a user fine-tunes on: chats, prompts with completions, or plain texts, as sequences whose completions are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...artifacts.checkpoints.manifest import sha256_of
from ...artifacts.concepts import read_training
from ...editing.errors import ConceptError, RequestError, one_line
from ...eval.concept import TrainingRow
from ..common.examples import Example
from ..common.tokens import encode, pieces


@dataclass(frozen=True)
class TuningData:
    """Rows and what is said of them."""

    rows: tuple[TrainingRow, ...]
    name: str
    """How they can be named in public."""
    sha256: str | None = None


@dataclass(frozen=True)
class Encoded:
    """Sequences to learn, and how many rows were left out because they do not fit the context."""

    examples: list[Example]
    too_long: int


def find_data(ref: str) -> TuningData:
    """Rows of a JSON lines file, or of a data set on the Hub (its ``train`` split).

    Raises:
        RequestError: There is no such file or data set.
        ConceptError: Bad rows; all are listed.
    """
    path = Path(ref)
    if path.is_file():
        return TuningData(read_training(path), path.name, sha256_of(path))
    if path.exists() or ref.startswith((".", "/")) or path.suffix in (".json", ".jsonl", ".csv"):
        raise RequestError(f"{ref} is no file; give a .jsonl file or the id of a data set on the Hub")
    return _from_hub(ref)


def encoded(rows: Sequence[TrainingRow], tokenizer: Any, limit: int) -> Encoded:
    """Rows as token ids; of chats and completions only what the model should say is learned, and the end of it.

    Long texts are cut into pieces that are all learned; a chat or completion that is too long is left out and counted.
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
    """One sequence for each assistant turn, with all that came before."""
    if not tokenizer.chat_template:
        raise RequestError("the data are chats and the tokenizer has no chat template; give prompts with completions")
    messages = [message.model_dump() for message in row.messages]
    turns = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:place], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(messages[: place + 1], return_dict=False)
            if whole[: len(before)] != before:
                raise RequestError(
                    "the tokenizer's chat template renders a turn differently once it is answered, so what the model should say "
                    "cannot be told from the prompt; give prompts with completions"
                )
            turns.append(Example(tuple(whole), len(before)))
    return turns


def _completed(row: TrainingRow, tokenizer: Any) -> Example:
    assert row.prompt is not None and row.completion is not None
    start = len(encode(tokenizer, row.prompt, True))
    ids = encode(tokenizer, row.prompt + row.completion, True)
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return Example((*ids, *end), min(start, len(ids) - 1))


def _from_hub(ref: str) -> TuningData:
    from datasets import load_dataset

    name, _, revision = ref.partition("@")
    try:
        rows = load_dataset(name, split="train", revision=revision or None)
    except Exception as error:  # the library raises dozens of kinds, all meaning that it is not to be had
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
