"""What can be wrong with a tokenizer's files that its library says in other words, or only once a model runs."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...editing.errors import CheckpointError
from ...eval.inference.encoding import UnknownToken, encode, within
from ..files.opened import OF_A_CHECKPOINT, regular_file
from ..files.parsed import read_object

EXTRA = "excise[tokenizers]"
"""What to install for tokenizers that are stored in no tokenizer.json."""


def missing_package(folder: Path) -> str:
    """The package that a tokenizer's only file needs and that is not installed; empty if none is."""
    if (folder / "tokenizer.json").exists():
        return ""
    for path in sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]):
        with OF_A_CHECKPOINT.about(path.name), regular_file(path) as file:
            # tiktoken writes lines of base64 and rank, sentencepiece a binary message.
            package = "tiktoken" if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", file.read(4096)) else "sentencepiece"
        if find_spec(package) is None:
            return f"its tokenizer is stored in {path.name} alone, which the package {package} reads"
    return ""


def check_ids(tokenizer: Any, folder: Path, name: str) -> None:
    """Let texts be refused whose tokens the model has no embedding for, and check that its prompts are not such ones.

    Raises:
        CheckpointError: The chat template, or what the tokenizer puts in front of a text, is such a token.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    with OF_A_CHECKPOINT.about(path.name):
        config = read_object(path)
    text = config.get("text_config")
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    if not isinstance(rows, int):
        return
    within(tokenizer, rows)
    try:
        encode(tokenizer, "a")
    except UnknownToken as error:
        raise CheckpointError(
            f"the tokenizer of {name} puts a token into every text that the model lacks ({str(error).partition(';')[0]}); give the model whose"
            " embedding was resized with it, or its first tokenizer"
        ) from error
