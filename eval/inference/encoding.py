"""Texts to token ids. What a tokenizer appends, such as an end token, is left out: nothing measured comes after an end."""

from typing import Any


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text that may go on.

    Args:
        special: With what the tokenizer puts in front of a text, such as a begin token.
    """
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return ids[: len(ids) - _appended(tokenizer, text, ids)] if special else ids


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
