"""Texts to token ids. What a tokenizer appends, such as an end token, is left out: nothing measured comes after an end."""

from typing import Any

from ...editing.errors import RequestError

_ROWS = "excise_embedding_rows"
"""Attribute of a tokenizer that knows more tokens than its model has embeddings."""


class UnknownToken(RequestError):
    """A text holds a token that the model has no embedding for."""


def within(tokenizer: Any, rows: int | None) -> int | None:
    """Let ``encode`` refuse tokens that a model with so many embeddings does not have; returns the number before.

    Tokens that were added to a tokenizer, most often ``[PAD]``, have such ids where the embedding was not resized.
    """
    before = getattr(tokenizer, _ROWS, None)
    setattr(tokenizer, _ROWS, rows if rows is not None and len(tokenizer) > rows else None)
    return before


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text that may go on.

    Args:
        special: With what the tokenizer puts in front of a text, such as a begin token.

    Raises:
        UnknownToken: The model has no embedding for one of them.
    """
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    ids = ids[: len(ids) - _appended(tokenizer, text, ids)] if special else ids
    check_known(tokenizer, ids)
    return ids


def check_known(tokenizer: Any, ids: list[int]) -> None:
    """Check that the model has an embedding for every id.

    Raises:
        UnknownToken: It does not; reading on would end in an index error, and on a GPU in a broken device.
    """
    rows = getattr(tokenizer, _ROWS, None)
    if rows is None:
        return
    beyond = next((token for token in ids if token >= rows), None)
    if beyond is not None:
        raise UnknownToken(
            f"a text holds the token {tokenizer.convert_ids_to_tokens(beyond)!r} with id {beyond}, and the model has"
            f" embeddings for ids 0 to {rows - 1}; leave it out of the text, or give a model whose embedding was resized"
        )


def _appended(tokenizer: Any, text: str, whole: list[int]) -> int:
    """How many tokens stand behind a text."""
    inner = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not whole[len(inner) :]:
        return 0
    if not inner:
        # Of no text it cannot be said what stands before it and what behind it.
        sample = list(tokenizer("a")["input_ids"])
        return _appended(tokenizer, "a", sample)
    starts = [place for place in range(len(whole) - len(inner) + 1) if whole[place : place + len(inner)] == inner]
    # A tokenizer that writes a text otherwise behind its begin token puts nothing behind it, as far as can be told.
    return len(whole) - starts[0] - len(inner) if starts else 0
