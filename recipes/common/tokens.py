"""Token ids of texts: encoding, windows that fit the context, the tokens at the end of prompts."""

from collections.abc import Sequence
from typing import Any

from ...editing.errors import RequestError
from ...editing.modules import language_config
from ...eval.inference import encoding

Row = tuple[int, ...]
"""Token ids."""

PLAIN_TEXT_POSITIONS = 3


def end_positions(setting: int, rows: Sequence[Sequence[int]], chat: bool) -> int:
    """How many tokens at the end of prompts to look at: the setting, or what the template writes after the user's text.

    Args:
        setting: 0 takes the tokens that all prompts end with, at most 8; of plain texts 3.

    Raises:
        RequestError: A prompt is shorter.
    """
    shared = 0
    while all(len(row) > shared and row[-1 - shared] == rows[0][-1 - shared] for row in rows):
        shared += 1
    count = setting or (max(1, min(shared, 8)) if chat else PLAIN_TEXT_POSITIONS)
    shortest = min(map(len, rows))
    if count > shortest:
        raise RequestError(
            f"positions={count}, but the shortest prompt of contrast.jsonl has {shortest} tokens; ask for fewer"
        )
    return count


def encode(tokenizer: Any, text: str, special: bool) -> Row:
    """Token ids of a rendered text."""
    return tuple(encoding.encode(tokenizer, text, special=special))


def text_limit(model: Any) -> int:
    """Tokens of a text that are read at once."""
    return min(int(getattr(language_config(model), "max_position_embeddings", 1024)), 1024) // 2


def pieces(ids: Row, limit: int) -> list[Row]:
    """A sequence in windows that fit the context."""
    return [ids[start : start + limit] for start in range(0, len(ids), limit)]
