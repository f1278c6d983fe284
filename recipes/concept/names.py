"""Names that rows share, as the subjects of rows that state none.

Lines of a text file say nothing of what they are about. Divided one by one, wordings of one fact would be trained on in
group T and measured in group V. Rows that share a name count as rows on one subject.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

NAME = re.compile(r"(?<![\w'’-])[^\W\d_]\w{2,}")
SENTENCE_END = re.compile(r"[.!?:;\"“”‘(\n]\s*$")
FEWEST, SHARE = 10, 0.05
"""Rows that a name may stand in, and share of all rows, for rows to be tied together by it: more is a topic."""
LARGEST = 0.25
"""Share of all rows that may be tied together."""


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
