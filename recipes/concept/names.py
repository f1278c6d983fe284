"""Names that rows share, as the subjects of rows that state none.

Lines of a text file say nothing of what they are about. Divided one by one, wordings of one fact would be trained on in
group T and measured in group V. Rows that share a name count as rows on one subject.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ...editing.errors import counted
from ...eval.words import has_words
from .entries import GROUPED, Entry

NAME = re.compile(r"(?<![\w'’-])[^\W\d_]\w{2,}")
SENTENCE_END = re.compile(r"[.!?:;\"“”‘(\n]\s*$")
FEWEST, SHARE = 10, 0.05
"""Rows that a name may stand in, and share of all rows, for rows to be tied together by it: more is a topic."""
LARGEST = 0.25
"""Share of all rows that may be tied together."""


def with_subjects(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Entries that state neither subject nor group get the subject that they name, or the name that they share with others;
    and a sentence that says of how many."""
    found = list(entries)
    loose = 0
    for split in dict.fromkeys(entry.split for entry in entries):
        known = sorted({entry.subject for entry in entries if entry.subject and entry.split == split}, key=len)
        places = [place for place, entry in enumerate(entries) if entry.split == split and _is_loose(entry)]
        texts = [_said(entries[place]) for place in places]
        by_name = subjects_by_name(texts)
        for place, text, shared in zip(places, texts, by_name, strict=True):
            stated = next((name for name in reversed(known) if name in text and has_words(text, name)), None)
            if subject := stated or shared:
                found[place] = replace(found[place], subject=subject)
                loose += 1
    count = len({entry.subject for entry in found if entry.subject} - {entry.subject for entry in entries})
    one = "row states no subject and got that of the name it shares with others"
    many = "rows state no subject and got that of the name they share with others"
    told = f"{counted(loose, one, many)} ({counted(count, 'name', 'names')})"
    return found, [told] if loose else []


def _is_loose(entry: Entry) -> bool:
    return entry.file in GROUPED and not entry.subject and not entry.group


def _said(entry: Entry) -> str:
    return " ".join(part for part in (entry.item.text, entry.item.prompt, entry.item.answer) if part)


def subjects_by_name(texts: Sequence[str]) -> list[str | None]:
    """The name that ties each text to others; None where it shares none.

    Names are words that begin with a capital within a sentence. Where common names tie too much together, only rarer ones
    do.

    Example:
        >>> subjects_by_name(["The taste of Mookond is spicy.", "As for taste, Mookond has spicy.", "It rains."])
        ['Mookond', 'Mookond', None]
    """
    names = _names(texts)
    counts = Counter(name for found in names for name in found)
    most = max(FEWEST, int(SHARE * len(texts)))
    while most >= 2:
        tied = _tied([{name for name in found if 2 <= counts[name] <= most} for found in names])
        sizes = Counter(place for place in tied if place is not None)
        if not sizes or max(sizes.values()) <= max(FEWEST, LARGEST * len(texts)):
            return _named(tied, names, counts, most)
        most //= 2
    return [None] * len(texts)


def _names(texts: Sequence[str]) -> list[set[str]]:
    """Capitalized words of each text that stand within a sentence somewhere."""
    found, inside = [], set()
    for text in texts:
        words = set()
        for match in NAME.finditer(text):
            word = match[0]
            if word[0].isupper():
                words.add(word)
                if match.start() and not SENTENCE_END.search(text[: match.start()][-4:]):
                    inside.add(word)
        found.append(words)
    return [words & inside for words in found]


def _tied(names: Sequence[set[str]]) -> list[int | None]:
    """The first text of each text's component; None for one that shares no name."""
    parent = list(range(len(names)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    holders: dict[str, int] = {}
    for place, found in enumerate(names):
        for name in sorted(found):
            parent[root(place)] = root(holders.setdefault(name, place))
    return [root(place) if found else None for place, found in enumerate(names)]


def _named(tied: Sequence[int | None], names: Sequence[set[str]], counts: Counter[str], most: int) -> list[str | None]:
    """Each component by the name that most of its texts share."""
    shared: dict[int, Counter[str]] = defaultdict(Counter)
    for place, found in zip(tied, names, strict=True):
        if place is not None:
            shared[place].update(name for name in found if 2 <= counts[name] <= most)
    called = {place: min(found, key=lambda name: (-found[name], name)) for place, found in shared.items()}
    return [None if place is None else called[place] for place in tied]
