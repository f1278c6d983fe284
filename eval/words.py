"""Words of texts in any script: where they begin and end, and what counts as one where no spaces part them."""

import re
import sys
import unicodedata
from functools import lru_cache

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Scripts without spaces between words: each character counts as a word."""
_HANGUL = "\u1100-\u11ff\uac00-\ud7ff"
"""Words have spaces between them and particles at their ends."""
_HIRAGANA = "\u3040-\u309f"
"""What Japanese writes endings and particles with, which say nothing of a topic."""


def has_words(text: str, words: str) -> bool:
    """Whether some words stand whole in a text, whatever their case and however their accents are stored.

    >>> has_words("They moved to Newark.", "New"), has_words("他住在巴黎。", "巴黎")
    (False, True)
    """
    searched = _normal(text)
    return whole_words(_normal(words), searched).search(searched) is not None


def contains(text: str, phrase: str) -> bool:
    """Whether a text holds a phrase, in whole words or not, whatever the case, the apostrophe and how accents are
    stored.

    >>> contains("I can’t help", "I CAN'T")
    True
    """
    return _normal(phrase) in _normal(text)


def words_of(text: str) -> list[str]:
    """Words and signs of a text, without case; of a script without spaces, its characters.

    >>> words_of("Don't go.")
    ['don', "'", 't', 'go', '.']
    """
    plain = _normal(text)
    return (_PLAIN_TOKENS if plain.isascii() else _tokens()).findall(plain)


def topical(text: str) -> set[str]:
    """What in a text may say what it is about: words of four letters and more; of a script without spaces, pairs of
    neighbouring characters.

    >>> sorted(topical("Tell me of Paris")), sorted(topical("巴黎在哪里"))
    (['paris', 'tell'], ['哪里', '在哪', '巴黎', '黎在'])
    """
    normal = _normal(text)
    pairs = set() if normal.isascii() else {match[1] for match in _pairs().finditer(normal)}
    return pairs | {word for word in words_of(text) if len(word) >= 4}


def whole_words(words: str, text: str | None = None) -> re.Pattern[str]:
    """A pattern that finds some words, exactly so written, where they stand whole.

    Args:
        text: The text that is searched. For plain English the pattern is far quicker made than one for any script.
    """
    return _in_ascii(words) if text is not None and text.isascii() else _in_any_script(words)


@lru_cache(maxsize=4096)
def _in_ascii(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")


@lru_cache(maxsize=4096)
def _in_any_script(words: str) -> re.Pattern[str]:
    marks = _marks()
    # In place of \b, which fails at an answer that begins or ends with a sign. Beside a character of a script without
    # spaces any place may be the edge of a word; marks belong to the letter before them.
    begins = "" if re.match(f"[{_UNSPACED}]", words) else rf"(?<![^\W{_UNSPACED}])(?<![{marks}])"
    open_ended = re.search(f"[{_UNSPACED}{_HANGUL}][{marks}]*$", words)
    ends = f"(?![{marks}])" if open_ended else rf"(?![^\W{_UNSPACED}])(?![{marks}])"
    return re.compile(begins + re.escape(words) + ends)


def _normal(text: str) -> str:
    plain = unicodedata.normalize("NFC", text.replace("’", "'")).casefold()
    return unicodedata.normalize("NFC", plain)


_PLAIN_TOKENS = re.compile(r"\w+|[^\w\s]")


@lru_cache(maxsize=1)
def _tokens() -> re.Pattern[str]:
    marks = _marks()
    return re.compile(rf"[{_UNSPACED}][{marks}]*|(?:[^\W{_UNSPACED}][{marks}]*)+|[^\w\s]")


@lru_cache(maxsize=1)
def _pairs() -> re.Pattern[str]:
    one = f"[{_UNSPACED}][{_marks()}]*"
    return re.compile(f"(?=({one}{one}))(?![{_HIRAGANA}]{{2}})")


@lru_cache(maxsize=1)
def _marks() -> str:
    """All combining marks, vowel signs among them, as ranges of a pattern: for ``re`` they are no part of a word."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)).startswith("M"):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"{chr(low)}-{chr(high)}" for low, high in ranges)


def plain(text: str) -> str:
    """A text without differences of case and spaces."""
    return " ".join(text.casefold().split())
