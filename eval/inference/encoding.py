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
    backend = _backend(tokenizer)
    if backend is not None:
        encoding = backend.encode(text, add_special_tokens=special)
        ids, behind = list(encoding.ids), _added_behind(backend, encoding) if special else 0
    else:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        behind = _appended(tokenizer, text, ids) if special else 0
    ids = ids[: len(ids) - behind]
    check_known(tokenizer, ids)
    return ids


def _backend(tokenizer: Any) -> Any | None:
    """What a fast tokenizer hands a text to, where its class does nothing else with it: many texts are encoded one by one,
    and nine tenths of the time would go into arguments."""
    if not _hands_on(type(tokenizer)):
        return None
    backend = tokenizer.backend_tokenizer
    # As a call without arguments sets them.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _hands_on(kind: type[Any]) -> bool:
    from transformers import PreTrainedTokenizerFast

    usual = ("__call__", "_encode_plus")
    return issubclass(kind, PreTrainedTokenizerFast) and all(
        getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in usual
    )


def _added_behind(backend: Any, encoding: Any) -> int:
    """How many tokens the tokenizer put behind a text."""
    mask = encoding.special_tokens_mask
    if mask and all(mask):
        # Of no text it cannot be said what stands before it and what behind it.
        mask = backend.encode("a").special_tokens_mask
    return next((place for place, added in enumerate(reversed(mask)) if not added), 0)


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
