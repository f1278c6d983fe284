"""Long documents as windows of words."""

import re

WORDS = 200
"""Words of a window."""
LONGEST = 300
"""Words of the longest text that stays whole."""
WORD = re.compile(r"\S+")


def windows(text: str) -> list[str]:
    """A text in windows of ``WORDS`` words, with its own blanks and line ends; the last one takes what is left over.

    Example:
        >>> windows("a short text")
        ['a short text']
    """
    spans = [match.span() for match in WORD.finditer(text)]
    if len(spans) <= LONGEST:
        return [text.strip()] if spans else []
    starts = list(range(0, len(spans) - WORDS // 2, WORDS))
    stops = [*starts[1:], len(spans)]
    return [text[spans[start][0] : spans[stop - 1][1]] for start, stop in zip(starts, stops, strict=True)]
